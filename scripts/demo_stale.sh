#!/usr/bin/env bash
# Demonstration of how a cache comes to serve a stale price, and why this one does not. First comes textbook
# cache-aside, played by hand on a key of its own. After two accidents Redis returns the old price for five minutes.
# Then the same two accidents happen to this service, desafio3. The script works on its own product, and deletes it in
# the end.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
attach

holder="demo_stale $$" # the session that locks the product's row for a moment
# Even after Ctrl-C, no row is locked, no key and no mark is left, and the product is deleted.
restore() {
  release
  wait # for a session that was only about to lock the row: it ends automatically
  delete_product
  redis_cli DEL "textbook:$id" "writers:products:$id"
  redis_cli ZREM writers:products:all hand
} >/dev/null 2>&1
release() { sql "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = '$holder'"; }
row_is_locked() { is "$(sql "SELECT wait_event FROM pg_stat_activity WHERE application_name = '$holder'")" PgSleep; }
at_exit restore

# ---------------------------------------------------------------- a timeline in two columns

reader=0 writer=34 # where the columns begin

# part SYSTEM TITLE LINE...: begins one of the four parts, with an introduction.
part() {
  steps=0
  title "$2"
  printf '  %s\n' "${@:3}"
  printf '\n      %s%-*s%s%s\n' "$bold" "$writer" "$1: reader" "$1: writer" "$plain"
}

# step COLUMN TEXT: prints the next line of the timeline. The pause is for a class to read it.
step() {
  steps=$((steps + 1))
  printf '  %2d  %*s%s\n' "$steps" "$1" '' "$2"
  if [[ -t 1 ]]; then sleep 1.5; fi
}

# at COLUMN redis_cli|sql|api WORDS...: runs it, shows it with the answer, and leaves that in $answer.
at() {
  answer=$("${@:2}")
  if is "$2" sql; then answer=${answer:-done}; fi
  step "$1" "${*:3}  ->  ${answer:-(nothing)}"
}
api() { request "$@" >/dev/null && echo "$status $cache $(field price)"; }

# outcome WHERE PRICE: compares the price that clients get from WHERE after the accident with the one in PostgreSQL.
prices=()
outcome() {
  local current
  price=$2 current=$(sql "SELECT price FROM products WHERE id = $id")
  is "$price" "$current" || price+=' (stale)'
  prices+=("$price")
  printf '\n      %s%s returns %s; PostgreSQL holds %s%s\n' "$bold" "$1" "$price" "$current" "$plain"
}
number_stale() { printf '%s\n' "$@" | grep -c stale || true; }

# textbook_is_stale PRICE: claims that Redis still returns this old price, and will for minutes.
textbook_is_stale() {
  outcome Redis "$(redis_cli GET "textbook:$id")"
  claim 'Redis returns the old price' is "$price" "$1 (stale)"
  ask 'old price stays cached for minutes' '[23][0-9][0-9]' redis_cli TTL "textbook:$id"
}

# look: reads the mark of a writer at work, and what the product's key holds: a body, a reader's lease, or nothing.
look() { mark=$(redis_cli ZRANGE "writers:products:$id" 0 -1) key=$(redis_cli GET "products:$id"); }
is_marked() { look && [[ -n $mark ]]; }

# held_write: the service changes the price while the row is locked, and this script looks at Redis meanwhile. It fails
# if PostgreSQL ends the waiting statement first, which it does after 2 s, as on a slow machine.
held_write() {
  sql "SET application_name = '$holder'; BEGIN; SELECT FROM products WHERE id = $id FOR UPDATE; SELECT pg_sleep(10)" \
    >/dev/null 2>&1 &
  wait_for 10 row_is_locked
  exec 3< <(api PUT "/products/$id" '{"price":4.00}')
  wait_for 5 is_marked
  release >/dev/null
  read -r answer <&3 && is "$answer" '200  4.00'
}

# keys WHAT STATE [before]: shows what Redis holds now, or held at the last look before. It claims that the last step's
# answer, the mark and the key are as in STATE: "answer; mark; key."
keys() {
  [[ -n ${3:-} ]] || look
  say "    | mark: ${mark:-none}   key: $(printf '%.64s' "${key:-none}")"
  claim "$1" has "$answer; $mark; $key." "$2"
}

# fill_by_hand BODY: fills as the script in cache.go does: only with the reader's own lease and while no writer is at
# work.
fill_by_hand() {
  answer=$(redis_cli EVAL "if redis.call('GET', KEYS[1]) ~= ARGV[1] or redis.call('EXISTS', KEYS[2]) == 1 then
    return 'refused' end return redis.call('SET', KEYS[1], ARGV[2], 'EX', 300)" \
    2 "products:$id" "writers:products:$id" lease:hand "$1")
  step $reader "fill products:$id  ->  $answer"
}

# ---------------------------------------------------------------- the demonstration

title 'A product that costs 1.00'
need_cache
create_product 'creation returns 201' '{"name":"Café","price":1.00,"category":"demo"}'

part textbook '1. Textbook cache-aside: a slow reader' \
  'A reader takes the price from Redis, or reads PostgreSQL and fills the key.' \
  'A writer changes PostgreSQL, then deletes the key.'
at $reader redis_cli GET "textbook:$id"
at $reader sql "SELECT price FROM products WHERE id = $id"
at $writer sql "UPDATE products SET price = 2.00 WHERE id = $id"
at $writer redis_cli DEL "textbook:$id"
at $reader redis_cli SET "textbook:$id" 1.00 EX 300
textbook_is_stale 1.00

part textbook '2. Textbook cache-aside: a writer that dies between COMMIT and DEL' 'A reader has filled the key.'
at $reader redis_cli SET "textbook:$id" 2.00 EX 300
at $writer sql "UPDATE products SET price = 3.00 WHERE id = $id"
step $writer '(dies)'
at $reader redis_cli GET "textbook:$id"
textbook_is_stale 2.00

part desafio3 '3. This service: a slow reader' \
  'A reader takes a lease on the empty key. It fills the key only with this lease and while no writer is marked.' \
  'A writer leaves a mark and deletes the key, lease included, before it changes PostgreSQL and again after it.' \
  'The reader is played by hand, with a lease of 60 s. The writer is the service, which waits for a locked row.'
at $reader redis_cli SET "products:$id" lease:hand NX GET EX 60
at $reader sql "SELECT price FROM products WHERE id = $id"
keys 'reader has a lease and the old price' '3.00; ; lease:hand.'
step $writer "PUT /products/$id {\"price\":4.00}"
claim 'writer at work has left a mark' wait_for 60 held_write
keys 'lease is deleted' '; .' before
step $writer "->  $answer"
keys 'answered writer has removed its mark' '200  4.00; ; .'
fill_by_hand 3.00
claim 'fill with the old price is refused' is "$answer" refused
say 'Once more, without a writer. The service, another reader, finds the lease and fills nothing:'
at $reader redis_cli SET "products:$id" lease:hand NX GET EX 60
at $reader api GET "/products/$id"
claim 'read returns the new price from PostgreSQL' is "$answer" '200 redis; fwd=miss 4.00'
fill_by_hand "$(http "$url/products/$id")"
at $reader api GET "/products/$id"
claim 'read after the fill is a hit with the new price' is "$answer" '200 redis; hit 4.00'
outcome desafio3 "${answer##* }"

part desafio3 '4. This service: a writer that dies between COMMIT and DEL' \
  'The writer is played by hand, under the name of the service, so that no trigger reports its change.'
expires=$(redis_cli EVAL "return redis.call('TIME')[1] + 12" 0) # a mark lasts 12 s by the clock of Redis
at $writer redis_cli ZADD "writers:products:$id" "$expires" hand
at $writer redis_cli ZADD writers:products:all "$expires" hand
at $writer redis_cli DEL "products:$id" products:all
at $writer sql "SET application_name = 'desafio3'; UPDATE products SET price = 5.00 WHERE id = $id"
step $writer '(dies)'
at $reader api GET "/products/$id"
claim 'read returns the new price from PostgreSQL' is "$answer" '200 redis; fwd=miss 5.00'
keys 'marked key stays empty' '; hand; .'
outcome desafio3 "${answer##* }"
say 'The mark expires 12 s after the writer left it ...'
filled() { has "$(api GET "/products/$id")" 'redis; hit'; }
claim 'reader fills the key after the mark has expired' wait_for 20 filled
at $reader api GET "/products/$id"
keys 'key holds the new price' '200 redis; hit 5.00; ; {'

title 'Score'
printf '  %-40s%-16s%s\n' '' textbook desafio3 'slow reader' "${prices[0]}" "${prices[2]}" \
  'writer that dies' "${prices[1]}" "${prices[3]}"
textbook=$(number_stale "${prices[@]:0:2}") desafio3=$(number_stale "${prices[@]:2}")
claim 'desafio3 leaves no stale price' is "$desafio3" 0
say "textbook: $textbook of 2 accidents left a stale price; desafio3: $desafio3 of 2"

verdict
