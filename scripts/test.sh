#!/usr/bin/env bash
# Tries the API, endpoint by endpoint, and checks every answer. It works on a product of its own, which
# it deletes in the end.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib.sh
attach

id=''
# Also when the script is interrupted.
at_exit delete_product

title '1. Information and health'
expect 'the service introduces itself' '200 *"endpoints"' GET /
expect 'it is healthy' '200 *"status":"healthy"' GET /health
claim 'the database is connected' is "$(field database)" connected
claim 'the cache is connected' is "$(field cache)" connected
expect 'it tells of all three services' '200 *"web":*"postgres":*"redis":' GET /services
claim 'the cache is in use' wait_for 20 cache_in_use
expect 'it counts what the cache does' '200 *"hit_rate"' GET /stats
products=$(field products)

title '2. Create and read'
create_product 'a product is created' \
  '{"name":"Produto Teste","description":"Descrição do produto","price":99.99,"stock":100,"category":"test"}'
claim 'its price is exact' is "$(field price)" 99.99
expect 'the first read comes from PostgreSQL' '200 redis; fwd=miss' GET "/products/$id"
first=$body
expect 'the second one from Redis' '200 redis; hit' GET "/products/$id"
claim 'and both are the same bytes' is "$body" "$first"
expect 'the list has it' "200 *\"id\":$id," GET /products
claim 'the list has one product more than before' is "$(field count)" "$((products + 1))"
expect 'a filtered page has one product of that category' '200 *"count":1,*"category":"test"' GET '/products?category=test&limit=1'

title '3. Update'
expect 'it is updated' '200 *"name":"Produto Atualizado",*"price":149.99,"stock":50,' \
  PUT "/products/$id" '{"name":"Produto Atualizado","price":149.99,"stock":50}'
claim 'what was not sent stays' is "$(field description)" 'Descrição do produto'
expect 'the next read is the new product, not the cached old one' '200 redis; fwd=miss *"price":149.99,' GET "/products/$id"

title '4. What is refused'
expect 'broken JSON' 400 POST /products '{"name":'
expect 'broken rules, with every field at fault' '422 *"errors":' POST /products '{"name":"  ","price":-1}'
claim 'the name is one, and the price the other' test -n "$(field name)" -a -n "$(field price)"
expect 'an update of nothing' 422 PUT "/products/$id" '{}'
expect 'a product that does not exist' 404 GET /products/999999999999
expect 'an id that is none' 404 GET /products/abc
expect 'a parameter that does not exist' 400 GET '/products?color=blue'
expect 'a method that does not exist' 405 PATCH /products
expect 'and nothing of it changed the product' '200 *"price":149.99,' GET "/products/$id"

title '5. Clear the cache'
expect 'it is cleared' 200 DELETE /cache/clear
expect 'the next list comes from PostgreSQL' '200 redis; fwd=miss' GET /products

title '6. Delete'
expect 'it is deleted' 204 DELETE "/products/$id"
expect 'and gone' 404 GET "/products/$id"
expect 'it cannot be deleted twice' 404 DELETE "/products/$id"
id=''
expect 'the catalogue is as it was' "200 *\"count\":$products," GET /products

verdict
