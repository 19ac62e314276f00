#!/usr/bin/env bash
# Demonstration of what happens when a server goes: without PostgreSQL the service says so and comes back
# with it; without Redis, or with a silent one, it goes on. It works on a product of its own, which it
# deletes in the end.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib.sh
attach

id='' down='' paused=''
# Also when the script is interrupted: everything runs again, and the product is gone.
restore() {
  if [[ -n $paused ]]; then control unpause "$paused"; fi
  if [[ -n $down ]]; then control start "$down"; fi
  if [[ -n $id ]]; then wait_for 60 deleted; fi
} >/dev/null 2>&1
deleted() { request DELETE "/products/$id" && [[ $status == 204 || $status == 404 ]]; }
trap restore EXIT

# recovers: waits until the service is healthy, and says how long that took.
recovers() {
  local began=$SECONDS
  wait_for 60 healthy || return 1
  request GET /health
  say "after about $((SECONDS - began)) s"
  show_stack
}
# turn: a control, and what then runs.
turn() { control "$@" && show_stack; }
healthy() { request GET /health >/dev/null && is "$status $(field status)" '200 healthy'; }

title '1. Everything runs'
show_stack
request GET /health
claim 'the service is healthy' is "$status $(field status)" '200 healthy'
claim 'the cache is in use' wait_for 20 cache_in_use
expect 'a product is created' 201 POST /products '{"name":"Produto da demonstração","price":1.00,"category":"demo"}'
id=$(field id)
request GET "/products/$id"
expect 'and cached' '200 redis; hit' GET "/products/$id"

title '2. PostgreSQL stops'
down=postgres
turn stop postgres
request GET /products
say "$body"
claim 'the service says what is missing' is "$status $(field detail)" '503 database unavailable'
expect 'it does not vouch for the cached copy either' 503 GET "/products/$id"
request GET /health
claim 'it is up, and knows that it is unhealthy' is "$status $(field database)" '503 disconnected'

title '3. PostgreSQL starts'
control start postgres
down=''
claim 'the service recovers, and nobody had to restart it' recovers
request GET "/products/$id"
claim 'the product is still there' is "$status $(field price)" '200 1.00'
claim 'the cache is in use again' wait_for 20 cache_in_use

title '4. Redis stops'
request GET "/products/$id"
request GET "/products/$id"
claim 'it holds the product, at 1.00' is "$cache $(field price)" 'redis; hit 1.00'
down=redis
turn stop redis
expect 'reads go to PostgreSQL' '200 redis; fwd=bypass' GET "/products/$id"
request PUT "/products/$id" '{"price":2.00}'
claim 'writes work too' is "$status $(field price)" '200 2.00'
request GET "/products/$id"
claim 'and are seen' is "$status $(field price)" '200 2.00'
request GET /health
claim 'the service is degraded, not down' is "$status $(field status)" '200 degraded'
expect 'only the cache cannot be cleared' 503 DELETE /cache/clear

title '5. Redis starts, with what it held before it stopped'
control start redis
down=''
loaded=$(redis_cli INFO persistence | tr -d '\r' | sed -n 's/^rdb_last_load_keys_loaded://p')
say "redis-cli: INFO persistence  ->  rdb_last_load_keys_loaded:$loaded"
claim 'Redis has loaded old copies from its snapshot' test "${loaded:-0}" -ge 1
claim 'the service is healthy again' recovers
request GET "/products/$id"
claim 'they are not believed: the price is the new one' is "$status $(field price)" '200 2.00'
claim 'the cache is in use again' wait_for 20 cache_in_use
request GET "/products/$id"
request GET "/products/$id"
claim 'and holds the new one' is "$cache $(field price)" 'redis; hit 2.00'

title '6. Redis falls silent: it takes connections and never answers'
paused=redis
turn pause redis
request GET "/products/$id"
claim 'the first read finds out, and is answered' is "$status $(field price)" '200 2.00'
expect 'the next ones do not wait for it' '200 redis; fwd=bypass' GET "/products/$id"
claim 'this one took less than half a second' test "$micros" -lt 500000
control unpause redis
paused=''
claim 'the cache is in use again' wait_for 20 cache_in_use

title '7. The catalogue as it was'
expect 'the product is deleted' 204 DELETE "/products/$id"
id=''

verdict
