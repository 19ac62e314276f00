#!/usr/bin/env bash
# Tries the API, endpoint by endpoint, and checks every answer. It works on a product of its own, which
# it deletes in the end.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
attach
at_exit delete_product

title '1. Information and health'
expect 'the service introduces itself' '200 *"endpoints"' GET /
expect 'it is healthy, and so are both servers' '200 *"healthy","database":"connected","cache":"connected"' GET /health
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
expect 'the list has one more than before, this one' "200 *\"count\":$((products + 1)),*\"id\":$id," GET /products
expect 'a filtered page has one product of that category' '200 *"count":1,*"category":"test"' GET '/products?category=test&limit=1'

title '3. Update'
expect 'it is updated, and what was not sent stays' \
  '200 *"name":"Produto Atualizado","description":"Descrição do produto","price":149.99,"stock":50,' \
  PUT "/products/$id" '{"name":"Produto Atualizado","price":149.99,"stock":50}'
expect 'the next read is the new product, not the cached old one' '200 redis; fwd=miss *"price":149.99,' GET "/products/$id"

title '4. What is refused'
expect 'broken JSON' 400 POST /products '{"name":'
expect 'broken rules, every field at fault' '422 *"errors":{"name":*"price":' POST /products '{"name":"  ","price":-1}'
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
expect 'the catalogue is as it was' "200 *\"count\":$products," GET /products

verdict
