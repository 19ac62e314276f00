#!/usr/bin/env bash
# Demonstration of what happens when a server goes: without PostgreSQL the service says so and comes back
# with it; without Redis, or with a silent one, it goes on. It works on a product of its own, which it
# deletes in the end.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
attach

# Also when the script is interrupted: everything runs again, and the product is gone. What runs is left alone, but may
# only be about to stop: so all is tried again until the service is healthy.
all_runs() {
  control start postgres
  control start redis
  control unpause redis
  healthy
} >/dev/null 2>&1
at_exit 'wait_for 60 all_runs && delete_product'

# recovers: waits until the service is healthy, and says how long that took.
recovers() {
  local began=$SECONDS
  wait_for 60 healthy || return 1
  request GET /health
  say "after about $((SECONDS - began)) s"
  show_stack
}
healthy() { request GET /health >/dev/null && is "$status $(field status)" '200 healthy'; }
# turn: a control, and what then runs.
turn() { control "$@" && show_stack; }

title '1. Everything runs'
show_stack
expect 'the service is healthy' '200 *"status":"healthy"' GET /health
claim 'the cache is in use' wait_for 20 cache_in_use
create_product 'a product is created' '{"name":"Produto da demonstração","price":1.00,"category":"demo"}'
claim 'and cached' cached 1.00

title '2. PostgreSQL stops'
turn stop postgres
expect 'the service says what is missing' '503 *"detail":"database unavailable"' GET /products
expect 'it does not vouch for the cached copy either' 503 GET "/products/$id"
expect 'it is up, and knows that it is unhealthy' '503 *"database":"disconnected"' GET /health

title '3. PostgreSQL starts'
control start postgres
claim 'the service recovers, and nobody had to restart it' recovers
expect 'the product is still there' '200 *"price":1.00,' GET "/products/$id"
claim 'the cache is in use again' wait_for 20 cache_in_use

title '4. Redis stops'
claim 'it holds the product, at 1.00' cached 1.00
turn stop redis
expect 'reads go to PostgreSQL' '200 redis; fwd=bypass' GET "/products/$id"
expect 'writes work too' '200 *"price":2.00,' PUT "/products/$id" '{"price":2.00}'
expect 'and are seen' '200 *"price":2.00,' GET "/products/$id"
expect 'the service is degraded, not down' '200 *"status":"degraded"' GET /health
expect 'only the cache cannot be cleared' 503 DELETE /cache/clear

title '5. Redis starts, with what it held before it stopped'
control start redis
has_loaded() { redis_cli INFO persistence 2>/dev/null | grep '^rdb_last_load_keys_loaded:[1-9]' | sed 's/^/  /'; }
claim 'Redis has loaded old copies from its snapshot' wait_for 20 has_loaded
claim 'the service is healthy again' recovers
expect 'they are not believed: the price is the new one' '200 *"price":2.00,' GET "/products/$id"
claim 'the cache is in use again' wait_for 20 cache_in_use
claim 'and holds the new one' cached 2.00

title '6. Redis falls silent: it takes connections and never answers'
turn pause redis
expect 'the first read finds out, and is answered' '200 *"price":2.00,' GET "/products/$id"
expect 'the next ones do not wait for it' '200 redis; fwd=bypass' GET "/products/$id"
claim 'this one took less than half a second' test "$micros" -lt 500000
control unpause redis
claim 'the cache is in use again' wait_for 20 cache_in_use

title '7. The catalogue as it was'
expect 'the product is deleted' 204 DELETE "/products/$id"

verdict
