#!/usr/bin/env bash
# Tries the API, endpoint by endpoint, and checks every answer. It works on its own product, and deletes it in the end.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
attach
at_exit delete_product

title '1. Information and health'
expect 'GET / lists the endpoints' '200 *"endpoints"' GET /
claim 'cache is in use' wait_for 20 cache_in_use
expect 'service and both servers are healthy' '200 *"healthy","database":"connected","cache":"connected"' GET /health
expect 'all three services are described' '200 *"web":*"postgres":*"redis":' GET /services
expect 'statistics include the hit rate' '200 *"hit_rate"' GET /stats
products=$(field products)

title '2. Creation and reads'
create_product 'creation returns 201' \
  '{"name":"Produto Teste","description":"Descrição do produto","price":99.99,"stock":100,"category":"test"}'
claim 'price is exact' is "$(field price)" 99.99
expect 'first read comes from PostgreSQL' '200 redis; fwd=miss' GET "/products/$id"
first=$body
expect 'second read comes from Redis' '200 redis; hit' GET "/products/$id"
claim 'both reads return the same bytes' is "$body" "$first"
expect 'list contains the new product' "200 *\"count\":$((products + 1)),*\"id\":$id," GET /products
expect 'filtered page has one product of the category' '200 *"count":1,*"test"' GET '/products?category=test&limit=1'

title '3. Update'
expect 'update changes only the fields sent' \
  '200 *"Produto Atualizado","description":"Descrição do produto","price":149.99,"stock":50,' \
  PUT "/products/$id" '{"name":"Produto Atualizado","price":149.99,"stock":50}'
expect 'read after the update returns the new price' '200 redis; fwd=miss *"price":149.99,' GET "/products/$id"

title '4. Rejected requests'
expect 'malformed JSON returns 400' 400 POST /products '{"name":'
expect 'invalid fields return 422 with an error each' '422 *{"name":*"price":' POST /products '{"name":"  ","price":-1}'
expect 'empty update returns 422' 422 PUT "/products/$id" '{}'
expect 'unknown product returns 404' 404 GET /products/999999999999
expect 'invalid id returns 404' 404 GET /products/abc
expect 'unknown parameter returns 400' 400 GET '/products?color=blue'
expect 'unsupported method returns 405' 405 PATCH /products
expect 'rejected requests leave the product unchanged' '200 *"price":149.99,' GET "/products/$id"

title '5. Cache clearing'
expect 'clearing the cache returns 200' 200 DELETE /cache/clear
expect 'list after the clearing comes from PostgreSQL' '200 redis; fwd=miss' GET /products

title '6. Deletion'
expect 'deletion returns 204' 204 DELETE "/products/$id"
expect 'deleted product returns 404' 404 GET "/products/$id"
expect 'catalogue is as large as before' "200 *\"count\":$products," GET /products

verdict
