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
request GET /services
claim 'it tells of all three services' is "$status" 200
claim 'the cache is in use' wait_for 10 cache_in_use
request GET /stats
claim 'it counts what the cache does' has "$body" '"hit_rate"'
products=$(field products)

title '2. Create and read'
request POST /products '{"name":"Produto Teste","description":"Descrição do produto","price":99.99,"stock":100,"category":"test"}'
claim 'a product is created' is "$status" 201
id=$(field id)
claim 'its price is exact' is "$(field price)" 99.99
request GET "/products/$id"
claim 'the first read comes from PostgreSQL' is "$status $cache" '200 redis; fwd=miss'
first=$body
request GET "/products/$id"
claim 'the second one from Redis' is "$status $cache" '200 redis; hit'
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
request POST /products '{"name":'
claim 'broken JSON' is "$status" 400
request POST /products '{"name":"  ","price":-1}'
claim 'broken rules, with every field at fault' is "$status" 422
claim 'the name is one' has "$body" '"name":"'
claim 'the price is the other' has "$body" '"price":"'
request PUT "/products/$id" '{}'
claim 'an update of nothing' is "$status" 422
request GET /products/999999999999
claim 'a product that does not exist' is "$status" 404
request GET /products/abc
claim 'an id that is none' is "$status" 404
request GET '/products?color=blue'
claim 'a parameter that does not exist' is "$status" 400
request PATCH /products
claim 'a method that does not exist' is "$status" 405
request GET "/products/$id"
claim 'and nothing of it changed the product' is "$(field price)" 149.99

title '5. Clear the cache'
request DELETE /cache/clear
claim 'it is cleared' is "$status" 200
request GET /products
claim 'the next list comes from PostgreSQL' is "$cache" 'redis; fwd=miss'

title '6. Delete'
request DELETE "/products/$id"
claim 'it is deleted' is "$status" 204
request GET "/products/$id"
claim 'and gone' is "$status" 404
request DELETE "/products/$id"
claim 'it cannot be deleted twice' is "$status" 404
id=''
request GET /products
claim 'the catalogue is as it was' is "$(field count)" "$products"

verdict
