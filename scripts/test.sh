#!/usr/bin/env bash
# Tries the API, endpoint by endpoint, and checks every answer. It works on a product of its own, which
# it deletes in the end.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib.sh
attach

id=''
# Also when the script is interrupted.
trap delete_product EXIT

title '1. Information and health'
request GET /
claim 'the service introduces itself' has "$body" '"endpoints"'
request GET /health
claim 'it is healthy' is "$status $(field status)" '200 healthy'
claim 'the database is connected' is "$(field database)" connected
claim 'the cache is connected' is "$(field cache)" connected
expect 'it tells of all three services' 200 GET /services
claim 'the cache is in use' wait_for 20 cache_in_use
request GET /stats
claim 'it counts what the cache does' has "$body" '"hit_rate"'
products=$(field products)

title '2. Create and read'
expect 'a product is created' 201 POST /products \
  '{"name":"Produto Teste","description":"Descrição do produto","price":99.99,"stock":100,"category":"test"}'
id=$(field id)
claim 'its price is exact' is "$(field price)" 99.99
expect 'the first read comes from PostgreSQL' '200 redis; fwd=miss' GET "/products/$id"
first=$body
expect 'the second one from Redis' '200 redis; hit' GET "/products/$id"
claim 'and both are the same bytes' is "$body" "$first"
request GET /products
claim 'the list has it' has "$body" "\"id\":$id,"
claim 'the list has one product more than before' is "$(field count)" "$((products + 1))"
request GET '/products?category=test&limit=1'
claim 'a filtered page has one product of that category' is "$status $(field count) $(field category)" '200 1 test'

title '3. Update'
request PUT "/products/$id" '{"name":"Produto Atualizado","price":149.99,"stock":50}'
claim 'it is updated' is "$status $(field name) $(field price) $(field stock)" '200 Produto Atualizado 149.99 50'
claim 'what was not sent stays' is "$(field description)" 'Descrição do produto'
request GET "/products/$id"
claim 'the next read is the new product, not the cached old one' is "$cache $(field price)" 'redis; fwd=miss 149.99'

title '4. What is refused'
expect 'broken JSON' 400 POST /products '{"name":'
expect 'broken rules, with every field at fault' 422 POST /products '{"name":"  ","price":-1}'
claim 'the name is one, and the price the other' test -n "$(field name)" -a -n "$(field price)"
expect 'an update of nothing' 422 PUT "/products/$id" '{}'
expect 'a product that does not exist' 404 GET /products/999999999999
expect 'an id that is none' 404 GET /products/abc
expect 'a parameter that does not exist' 400 GET '/products?color=blue'
expect 'a method that does not exist' 405 PATCH /products
request GET "/products/$id"
claim 'and nothing of it changed the product' is "$(field price)" 149.99

title '5. Clear the cache'
expect 'it is cleared' 200 DELETE /cache/clear
expect 'the next list comes from PostgreSQL' '200 redis; fwd=miss' GET /products

title '6. Delete'
expect 'it is deleted' 204 DELETE "/products/$id"
expect 'and gone' 404 GET "/products/$id"
expect 'it cannot be deleted twice' 404 DELETE "/products/$id"
id=''
request GET /products
claim 'the catalogue is as it was' is "$(field count)" "$products"

verdict
