#!/usr/bin/env bash
# Demonstration of the cache: a miss, a hit, how much faster a hit is, and why it is never a stale one.
# It works on a product of its own, which it deletes in the end.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib.sh
attach

rounds=100
id=''
trap delete_product EXIT

# median: of the numbers on its input, a line each.
median() { sort -n | awk '{ n[NR] = $1 } END { print n[int((NR + 1) / 2)] }'; }
as_ms() { printf '%d.%03d ms' "$(($1 / 1000))" "$(($1 % 1000))"; }

title '1. An empty cache'
claim 'the cache is in use' wait_for 10 cache_in_use
if ((failed)); then verdict; fi # which ends this script
request DELETE /cache/clear
claim 'the cache is cleared' is "$status" 200
claim 'Redis holds no list' is "$(redis_cli EXISTS products:all)" 0

title '2. The first read: PostgreSQL answers, and Redis keeps a copy'
request GET /products
claim 'a miss' is "$status $cache" '200 redis; fwd=miss'
first=$body

title '3. The second read: Redis answers'
request GET /products
claim 'a hit' is "$status $cache" '200 redis; hit'
claim 'with the same bytes' is "$body" "$first"
say "redis-cli: TTL products:all  ->  $(redis_cli TTL products:all) seconds left"

title "4. How much faster? ($rounds misses and hits in turn, their medians)"
misses='' hits='' wrong=0
for ((i = 0; i < rounds; i++)); do
  request DELETE /cache/clear >/dev/null
  request GET /products >/dev/null
  is "$cache" 'redis; fwd=miss' || wrong=$((wrong + 1))
  misses+=$micros$'\n'
  request GET /products >/dev/null
  is "$cache" 'redis; hit' || wrong=$((wrong + 1))
  hits+=$micros$'\n'
done
miss=$(printf '%s' "$misses" | median) hit=$(printf '%s' "$hits" | median)
say "miss: $(as_ms "$miss")    hit: $(as_ms "$hit")    ratio: $((miss * 10 / hit / 10)).$((miss * 10 / hit % 10))"
say 'The times include the way from curl to the service, which is the same for both. The larger the'
say 'catalogue and the farther the database, the more a hit spares.'
claim 'each was the miss or the hit it had to be' is "$wrong" 0
claim 'a hit is faster' test "$hit" -lt "$miss"

title '5. A write through the API: the old list is gone before the answer'
request POST /products '{"name":"Produto da demonstração","price":1.00,"category":"demo"}'
id=$(field id)
claim 'a product is created' is "$status" 201
request GET /products
claim 'the next list comes from PostgreSQL' is "$cache" 'redis; fwd=miss'
claim 'and has the product' has "$body" "\"id\":$id,"

title '6. A change behind the back of the API, with psql: the database tells the service'
request GET "/products/$id"
request GET "/products/$id"
claim 'the product is cached, at 1.00' is "$cache $(field price)" 'redis; hit 1.00'
say "psql: UPDATE products SET price = 2.00 WHERE id = $id"
sql "UPDATE products SET price = 2.00 WHERE id = $id"
# The notification takes milliseconds; a read may come before it.
new_price_is_seen() { request GET "/products/$id" && is "$(field price)" 2.00; }
claim 'the change is seen at once' wait_for 2 new_price_is_seen

title '7. The catalogue as it was'
request DELETE "/products/$id"
claim 'the product is deleted' is "$status" 204
id=''
request GET /products
claim 'the list is the first one again' is "$body" "$first"

title '8. The statistics'
request GET /stats
say "hits: $(field hits)    misses: $(field misses)    hit rate: $(LC_ALL=C printf '%.2f' "$(field hit_rate)")    keys: $(field keys)    memory: $(field memory_used)"
claim 'the hits were counted' test "$(field hits)" -ge "$rounds"
claim 'and the misses' test "$(field misses)" -ge "$rounds"

verdict
