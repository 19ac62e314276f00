#!/usr/bin/env bash
# Demonstration of the cache: a miss, a hit, how much faster a hit is, and why it is never a stale one.
# It works on a product of its own, which it deletes in the end.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
attach

rounds=50
at_exit 'delete_product && remove_many' # harmless where nothing of it is there

# For a moment the catalogue is a large one. The 10,000 have ids of their own, so that the next product of a user
# gets the number it would have got. They come and go under the service's own name, without 10,000 messages from
# the trigger, so the cache is cleared by hand. An interrupt waits for it: under Docker, psql would go on unseen.
in_bulk() {
  (trap '' INT TERM && sql "SET application_name = 'desafio3'; $1")
  request DELETE /cache/clear >/dev/null
}
remove_many() {
  in_bulk "DELETE FROM products WHERE id > 1000000000 AND category = 'demo'"
  sql 'VACUUM products' # or the next lookups would step over what is left of them
}

# timed: reads the whole list, and prints where it came from and how many microseconds that took, from the moment curl
# begins to connect until it has the last byte: "fwd=miss 1234".
timed() {
  curl -sS -m 20 -D - -o /dev/null -w '%{time_total}' "$url/products" | tr -d '\r.,' |
    awk '/^Cache-Status:/ { from = $3 } END { print from, $0 + 0 }'
}

# compare: misses and hits in turn, and their medians as bars. It leaves $miss, $hit and $tenths, ten times the ratio
# of the two.
compare() {
  times=$(for _ in $(seq "$rounds"); do
    request DELETE /cache/clear >/dev/null
    echo "$(timed) $(timed)"
  done)
  miss=$(median 2) hit=$(median 4) tenths=$((miss * 10 / hit))
  bar "$red" miss "$miss"
  bar "$green" hit "$hit"
  printf '\n    %sa hit is %d.%d times as fast%s\n\n' "$bold" $((tenths / 10)) $((tenths % 10)) "$plain"
  claim 'each was the miss or the hit it had to be' is "$(grep -cx 'fwd=miss [0-9]* hit [0-9]*' <<<"$times")" "$rounds"
}
median() { awk -v column="$1" '{ print $column }' <<<"$times" | sort -n | sed -n "$((rounds / 2))p"; }

# bar COLOUR NAME MICROSECONDS: two rows high, for the last row of a classroom; as wide as the screen for a miss.
bar() {
  local bar
  printf -v bar '%*s' $(($3 * 56 / miss + 1)) ''
  bar=$1${bar// /█}$plain
  printf '\n    %-5s%s\n    %-5s%s %d.%d ms\n' "$2" "$bar" '' "$bar" $(($3 / 1000)) $(($3 % 1000 / 100))
}

title '1. An empty cache'
need_cache
expect 'the cache is cleared' 200 DELETE /cache/clear
ask 'Redis holds no list' 0 redis_cli EXISTS products:all

title '2. The first read: PostgreSQL answers, and Redis keeps a copy'
expect 'a miss' '200 redis; fwd=miss' GET /products
first=$body

title '3. The second read: Redis answers'
expect 'a hit' '200 redis; hit' GET /products
claim 'with the same bytes' is "$body" "$first"
ask 'for so many seconds more' '[1-9]*' redis_cli TTL products:all

title "4. How much faster? (the medians of $rounds misses and $rounds hits)"
say "With the $(sql 'SELECT count(*) FROM products') products of this catalogue:"
compare
few=$tenths few_saved=$((miss - hit))
say 'That is little. PostgreSQL, too, has so few rows in its memory, and finds them in less time than the'
say 'request takes on its way: to connect, to ask, to answer. A hit cannot save that part.'

in_bulk "INSERT INTO products (id, name, description, price, stock, category)
  SELECT 1000000000 + i, 'Produto ' || i, 'Um de muitos, para uma lista comprida', i / 100.0, i, 'demo'
  FROM generate_series(1, 10000) i"
say 'With 10,000 products more, for a moment:'
compare
claim 'a hit is faster' test "$hit" -lt "$miss"
claim 'the ratio is larger' test "$tenths" -gt "$few"
claim 'and a hit saves much more time' test $((miss - hit)) -gt $((2 * few_saved))
say 'A miss reads each row and writes it as JSON; a hit passes the bytes on. So a cache saves what the answer'
say 'costs: it pays for large lists, slow queries and a database far away.'
remove_many

title '5. A write through the API: the old list is gone before the answer'
create_product 'a product is created' '{"name":"Produto da demonstração","price":1.00,"category":"demo"}'
expect 'the next list comes from PostgreSQL' '200 redis; fwd=miss' GET /products
claim 'and has the product' has "$body" "\"id\":$id,"

title '6. A change behind the back of the API, with psql: the database tells the service'
claim 'the product is cached, at 1.00' cached 1.00
ask 'psql changes it' '' sql "UPDATE products SET price = 2.00 WHERE id = $id"
# The notification takes milliseconds; a read may come before it.
new_price_is_seen() { request GET "/products/$id" && is "$(field price)" 2.00; }
claim 'the change is seen at once' wait_for 2 new_price_is_seen

title '7. The catalogue as it was'
expect 'the product is deleted' 204 DELETE "/products/$id"
request GET /products
claim 'the list is the first one again' is "$body" "$first"

title '8. The statistics'
request GET /stats
say "hits: $(field hits)    misses: $(field misses)    hit rate: $(LC_ALL=C printf '%.2f' "$(field hit_rate)")    keys: $(field keys)    memory: $(field memory_used)"
claim 'the hits were counted' test "$(field hits)" -ge "$rounds"
claim 'and the misses' test "$(field misses)" -ge "$rounds"

verdict
