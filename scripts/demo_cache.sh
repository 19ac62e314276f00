#!/usr/bin/env bash
# Demonstration of the cache: a miss, a hit, how much faster a hit is, and what a write does to it. It works on its own
# product, and deletes it in the end.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
attach

rounds=50 show_times='' # one time says little: part 4 has the medians
at_exit 'delete_product && remove_many' # harmless if nothing is left

# in_bulk SQL: makes the catalogue large for a moment, or small again. The 10,000 products have ids of their own, so the
# next product of a user gets the id it would have got anyway. The SQL runs under the service's application name,
# without 10,000 messages from the trigger, so the cache is cleared by hand. Ctrl-C waits for it, because under Docker
# psql would continue unseen.
in_bulk() {
  (trap '' INT TERM && sql "SET application_name = 'desafio3'; $1")
  request DELETE /cache/clear >/dev/null
}
remove_many() {
  in_bulk "DELETE FROM products WHERE id > 1000000000 AND category = 'demo'"
  sql 'VACUUM products' # or the next lookups would read past the dead rows
}

# timed: reads the whole list, and prints where it came from and the microseconds from curl's connecting to the last
# byte: "fwd=miss 1234".
timed() {
  http -D - -o /dev/null -w '%{time_total}' "$url/products" | tr -d '\r.,' |
    awk '/^Cache-Status:/ { from = $3 } END { print from, $0 + 0 }'
}

# compare: measures misses and hits in turn, and shows their medians as bars. It leaves $miss, $hit and $tenths, ten
# times their ratio.
compare() {
  times=$(for _ in $(seq "$rounds"); do
    request DELETE /cache/clear >/dev/null
    echo "$(timed) $(timed)"
  done)
  miss=$(median 2) hit=$(median 4) tenths=$((miss * 10 / hit))
  bar "$red" miss "$miss"
  bar "$green" hit "$hit"
  printf '\n    %sA hit is %d.%d times as fast.%s\n\n' "$bold" $((tenths / 10)) $((tenths % 10)) "$plain"
  claim "all $((2 * rounds)) reads hit or missed as expected" is "$(grep -c 'miss .* hit' <<<"$times")" "$rounds"
}
median() { awk -v column="$1" '{ print $column }' <<<"$times" | sort -n | sed -n "$((rounds / 2))p"; }

# bar COLOUR NAME MICROSECONDS: two rows high, for the last row of a classroom. A miss is as wide as the screen.
bar() {
  local bar
  printf -v bar '%*s' $(($3 * 56 / miss + 1)) ''
  bar=$1${bar// /█}$plain
  printf '\n    %-5s%s\n    %-5s%s %d.%d ms\n' "$2" "$bar" '' "$bar" $(($3 / 1000)) $(($3 % 1000 / 100))
}

title '1. An empty cache'
need_cache
expect 'clearing the cache returns 200' 200 DELETE /cache/clear
ask 'Redis holds no list' 0 redis_cli EXISTS products:all

title '2. The first read, from PostgreSQL'
expect 'first read is a miss' '200 redis; fwd=miss' GET /products
first=$body

title '3. The second read, from Redis'
expect 'second read is a hit' '200 redis; hit' GET /products
claim 'hit returns the same bytes' is "$body" "$first"

title "4. Speed (medians of $rounds misses and $rounds hits)"
say "With the $(sql 'SELECT count(*) FROM products') products of this catalogue:"
compare
few=$tenths
say 'That is not much: PostgreSQL finds a few rows faster than a request travels, and a hit travels, too.'

in_bulk "INSERT INTO products (id, name, description, price, stock, category)
  SELECT 1000000000 + i, 'Produto ' || i, 'Um de muitos, para uma lista comprida', i / 100.0, i, 'demo'
  FROM generate_series(1, 10000) i"
say 'With 10,000 more products, for a moment:'
compare
claim 'hit is faster than miss' test "$hit" -lt "$miss"
claim 'ratio grows with the catalogue' test "$tenths" -gt "$few"
say 'A miss turns every row into JSON. A hit passes the bytes on. A cache pays for large lists and slow queries.'
remove_many

title '5. A write through the API'
create_product 'creation returns 201' '{"name":"Produto da demonstração","price":1.00,"category":"demo"}'
expect 'list after the creation comes from PostgreSQL' '200 redis; fwd=miss' GET /products
claim 'list contains the new product' has "$body" "\"id\":$id,"

title '6. A write with psql, which the database reports to the service'
claim 'product is cached at 1.00' cached 1.00
ask 'psql changes the price' '' sql "UPDATE products SET price = 2.00 WHERE id = $id"
# The notification takes milliseconds; a read may come before it.
claim 'read returns the new price within 2 s' wait_for 2 price_is 2.00

title '7. Clean-up'
expect 'deletion returns 204' 204 DELETE "/products/$id"
request GET /products
claim 'list is the same as at the beginning' is "$body" "$first"

title '8. Statistics'
request GET /stats
printf '  hits: %d    misses: %d    hit rate: %.2f    keys: %d    memory: %s\n' \
  "$(field hits)" "$(field misses)" "$(field hit_rate)" "$(field keys)" "$(field memory_used)"
claim 'reads are counted' test "$(field hits)" -ge "$rounds"

verdict
