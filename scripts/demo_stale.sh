#!/usr/bin/env bash
# Demonstration of how a cache comes to lie, and why this one does not. First cache-aside as everybody writes it,
# played by hand on a key of its own: after two accidents Redis gives the old price for five minutes. Then the same
# two accidents happen to the service. It works on a product of its own, which it deletes in the end.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
attach

holder="demo_stale $$" # the session that holds the product's row for a moment
# Also when the script is interrupted: no row is held, no key and no mark of ours is left, and the product is gone.
restore() {
  let_go
  wait # for a session that was only about to hold the row: it ends by itself
  delete_product
  redis_cli DEL "textbook:$id" "writers:products:$id"
  redis_cli ZREM writers:products:all hand
} >/dev/null 2>&1
let_go() { sql "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = '$holder'" >/dev/null; }
row_is_held() { is "$(sql "SELECT wait_event FROM pg_stat_activity WHERE application_name = '$holder'")" PgSleep; }
at_exit restore

# ---------------------------------------------------------------- a timeline in two columns

reader=0 writer=30 # where the columns begin

# part TITLE LINE...: begins one, with what there is to know before.
part() {
  steps=0
  title "$1"
  printf '  %s\n' "${@:2}"
  printf '\n%s      %-*s%s%s\n' "$bold" "$writer" READER WRITER "$plain"
}

# step COLUMN TEXT: one more line of it. The pause is for a class to read it; nothing else depends on it.
step() {
  steps=$((steps + 1))
  printf '  %2d  %*s%s\n' "$steps" "$1" '' "$2"
  if [[ -t 1 ]]; then sleep 1.5; fi
}

# at COLUMN redis_cli|sql|api WORDS...: does it, shows it with the answer, and leaves that in $answer.
at() {
  answer=$("${@:2}")
  if is "$2" sql; then answer=${answer:-done}; fi
  step "$1" "${*:3}  ->  ${answer:-(nothing)}"
}
api() { request "$@" >/dev/null && echo "$status $cache $(field price)"; }

# side_by_side OLD NEW: what the two say in the end.
side_by_side() {
  in_redis=$(redis_cli GET "textbook:$id") seconds=$(redis_cli TTL "textbook:$id")
  in_postgres=$(sql "SELECT price FROM products WHERE id = $id")
  printf '\n      %s%-*s%s\n' "$bold" "$writer" "Redis says $in_redis" "PostgreSQL says $in_postgres$plain"
  say "    for $seconds seconds more"
  claim 'Redis has the old price' is "$in_redis $in_postgres" "$1 $2"
  claim 'and keeps it for about five minutes' test "$seconds" -gt 200
}

# look: what Redis has under the service's own keys, at the same moment: the mark of a writer at work, or nothing; and a
# body, a reader's lease or nothing.
look() {
  IFS='|' read -r marks held < <(redis_cli EVAL "return (redis.call('ZRANGE', KEYS[1], 0, -1)[1] or '') .. '|' ..
    (redis.call('GET', KEYS[2]) or '')" 2 "writers:products:$id" "products:$id")
}

# keys WHAT ANSWER [before]: shows what Redis has there now, or had at the last look before. It claims that the last
# step's answer and these two are as given: "answer; mark; held."
keys() {
  [[ -n ${3:-} ]] || look
  say "    | ZRANGE writers:products:$id 0 -1  ->  ${marks:-(nobody)}"
  say "    | GET products:$id  ->  $(printf '%.64s' "${held:-(nothing)}")"
  claim "$1" has "$answer; $marks; $held." "$2"
}

# ---------------------------------------------------------------- the demonstration

title 'A product that costs 1.00'
need_cache
create_product 'it is created' '{"name":"Café","price":1.00,"category":"demo"}'

part '1. Cache-aside as everybody writes it, and a slow reader' \
  'A reader takes the price from Redis, or else reads PostgreSQL and puts it there for 300 s.' \
  'A writer changes PostgreSQL, then deletes the key. Each of them is right, until they meet:'
at $reader redis_cli GET "textbook:$id"
at $reader sql "SELECT price FROM products WHERE id = $id"
price=$answer
at $writer sql "UPDATE products SET price = 2.00 WHERE id = $id"
at $writer redis_cli DEL "textbook:$id"
at $reader redis_cli SET "textbook:$id" "$price" EX 300
side_by_side 1.00 2.00

part '2. Another accident: a writer that dies between COMMIT and DEL' 'A reader has filled the key, as above.'
at $reader redis_cli SET "textbook:$id" 2.00 EX 300
at $writer sql "UPDATE products SET price = 3.00 WHERE id = $id"
step $writer 'nothing more: it is dead'
at $reader redis_cli GET "textbook:$id"
side_by_side 2.00 3.00

fill_by_hand() { # as the script in cache.go: under the reader's own lease, and while no writer is at work
  answer=$(redis_cli EVAL "if redis.call('GET', KEYS[1]) ~= ARGV[1] or redis.call('EXISTS', KEYS[2]) == 1 then
    return 'refused' end return redis.call('SET', KEYS[1], ARGV[2], 'EX', 300)" \
    2 "products:$id" "writers:products:$id" lease:hand "$1")
  step $reader "fill products:$id if it holds lease:hand and nobody writes  ->  $answer"
}
is_marked() { look && [[ -n $marks ]]; }
part '3. The service, and the slow reader' \
  'A reader takes a lease on the empty key, and may fill it only if the lease is still there. A writer' \
  'leaves its mark and deletes the key, lease and all, before it changes PostgreSQL and again after it.' \
  'The reader is played by hand, as in cache.go; its lease lasts 60 s and not 5, for you to read. The' \
  'writer is the service; another session holds the row, so that it has to wait a moment.'
at $reader redis_cli SET "products:$id" lease:hand NX GET EX 60
at $reader sql "SELECT price FROM products WHERE id = $id"
keys 'the reader has its lease, and the old price' '3.00; ; lease:hand.'
step $writer "PUT /products/$id {\"price\":4.00}"
sql "SET application_name = '$holder'; BEGIN; SELECT FROM products WHERE id = $id FOR UPDATE; SELECT pg_sleep(10)" \
  >/dev/null 2>&1 &
claim 'the row is held' wait_for 10 row_is_held
exec 3< <(api PUT "/products/$id" '{"price":4.00}')
claim 'the writer is at work: it has left its mark' wait_for 5 is_marked
let_go # at once: PostgreSQL lets a statement of the service wait for 2 s at most
keys 'and the lease is gone' '; .' before
read -r answer <&3
step $writer "->  $answer"
keys 'when the writer is answered, its mark is gone' '200  4.00; ; .'
fill_by_hand 3.00
claim 'the fill with the old price is refused' is "$answer" refused
say 'Once more, while nobody writes. The service, too, is a reader that finds a lease and does not fill:'
at $reader redis_cli SET "products:$id" lease:hand NX GET EX 60
at $reader api GET "/products/$id"
claim 'who asks now gets the new price' is "$answer" '200 redis; fwd=miss 4.00'
fill_by_hand "$(curl -sS "$url/products/$id")"
at $reader api GET "/products/$id"
claim 'this fill was taken, and is a hit' is "$answer" '200 redis; hit 4.00'

part '4. The service, and the writer that dies between COMMIT and DEL' \
  'The writer is played by hand, under the name of the service, so that no trigger tells of its change.'
expires=$(redis_cli EVAL "return redis.call('TIME')[1] + 12" 0) # a mark lasts 12 s by the clock of Redis
at $writer redis_cli ZADD "writers:products:$id" "$expires" hand
at $writer redis_cli ZADD writers:products:all "$expires" hand
at $writer redis_cli DEL "products:$id" products:all
at $writer sql "SET application_name = 'desafio3'; UPDATE products SET price = 5.00 WHERE id = $id"
step $writer 'nothing more: it is dead'
at $reader api GET "/products/$id"
claim 'a reader gets the new price, from PostgreSQL' is "$answer" '200 redis; fwd=miss 5.00'
keys 'and has not filled the key, for the mark' '; hand; .'
say 'The mark ends by itself, 12 s after it was left ...'
filled() { has "$(api GET "/products/$id")" 'redis; hit'; }
claim 'then a reader fills the key' wait_for 20 filled
at $reader api GET "/products/$id"
keys 'with the new price, and the mark is gone' '200 redis; hit 5.00; ; {'

verdict
