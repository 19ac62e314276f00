#!/usr/bin/env bash
# Demonstration of failures. Without PostgreSQL the service reports it, and recovers with it. Without Redis, or with one
# that does not respond, the service continues. The script works on its own product, and deletes it in the end.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
attach

# Even after Ctrl-C, everything runs again and the product is deleted. A server may be about to stop when this starts
# it, so this repeats until the service is healthy.
all_runs() {
  control start postgres
  control start redis
  control unpause redis
  healthy
} >/dev/null 2>&1
at_exit 'wait_for 60 all_runs && delete_product'

# recovers: waits until the service is healthy, and prints how long that took. Docker's own checks notice it later.
recovers() {
  local stopped=$SECONDS
  wait_for 60 healthy || return 1
  request GET /health
  say "$(since "$stopped")"
  wait_for 20 docker_agrees || true
  show_stack
}
healthy() { request GET /health >/dev/null && is "$status $(field status)" '200 healthy'; }
# turn ACTION SERVER: does it with control, and shows what runs afterwards.
turn() { control "$@" && show_stack; }

title '1. All services'
show_stack
if is "$mode" docker; then say 'Docker checks health only every few seconds, so its STATUS lags.'; fi
claim 'cache is in use' wait_for 20 cache_in_use
expect 'service is healthy' '200 *"status":"healthy"' GET /health
create_product 'creation returns 201' '{"name":"Produto da demonstração","price":1.00,"category":"demo"}'
claim 'product is cached' cached 1.00

title '2. PostgreSQL outage'
turn stop postgres
expect 'list returns 503 and the reason' '503 *"detail":"database unavailable"' GET /products
expect 'cached product returns 503, because nothing can confirm it' 503 GET "/products/$id"
expect 'health returns 503' '503 *"database":"disconnected"' GET /health

title '3. PostgreSQL recovery'
control start postgres
claim 'service recovers without a restart' recovers
expect 'product is still there' '200 *"price":1.00,' GET "/products/$id"

title '4. Redis outage'
claim 'product is cached at 1.00' cached 1.00
turn stop redis
expect 'read comes from PostgreSQL' '200 redis; fwd=bypass' GET "/products/$id"
expect 'update returns 200' '200 *"price":2.00,' PUT "/products/$id" '{"price":2.00}'
expect 'read returns the new price' '200 *"price":2.00,' GET "/products/$id"
expect 'service is degraded, not down' '200 *"status":"degraded"' GET /health
expect 'clearing the cache returns 503' 503 DELETE /cache/clear

title '5. Redis recovery, with an old snapshot'
control start redis
has_loaded() { redis_cli INFO persistence 2>/dev/null | grep '^rdb_last_load_keys_loaded:[1-9]' | sed 's/^/  /'; }
claim 'Redis has loaded old copies from its snapshot' wait_for 20 has_loaded
expect 'read returns the new price, not the old copy' '200 *"price":2.00,' GET "/products/$id"
claim 'service recovers' recovers
claim 'new price is cached' cached 2.00

title '6. Unresponsive Redis, which accepts connections and never answers'
turn pause redis
expect 'first read notices and returns the price' '200 *"price":2.00,' GET "/products/$id"
expect 'next read skips Redis' '200 redis; fwd=bypass' GET "/products/$id"
claim 'next read took less than half a second' test "$micros" -lt 500000
control unpause redis
claim 'cache is in use again' wait_for 20 cache_in_use

title '7. Clean-up'
expect 'deletion returns 204' 204 DELETE "/products/$id"

verdict
