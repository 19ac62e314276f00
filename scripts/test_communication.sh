#!/usr/bin/env bash
# Shows that the services reach each other: it looks up in PostgreSQL and in Redis what the service has written. It
# works on its own product, and deletes it in the end.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
attach
at_exit delete_product

title '1. Web and PostgreSQL'
name="Teste de comunicação $$"
create_product 'creation returns 201' "{\"name\":\"$name\",\"price\":10.00}"
ask 'PostgreSQL holds the created product' "$name" sql "SELECT name FROM products WHERE id = $id"

title '2. Web and Redis'
need_cache
request GET "/products/$id"
ask 'Redis holds the body that the service sent' "$body" redis_cli GET "products:$id"
ask 'TTL is set' '[1-9]*' redis_cli TTL "products:$id"
expect 'deletion returns 204' 204 DELETE "/products/$id"
ask 'Redis does not hold the deleted product' 0 redis_cli EXISTS "products:$id"

# "web ping" tries to connect from where the service runs. In the image it is called ping.
web=("$state/web") postgres=127.0.0.1:${POSTGRES_PORT:-} redis=127.0.0.1:${REDIS_PORT:-}
if is "$mode" docker; then
  web=(docker exec "$project-web") postgres=postgres redis=redis
  title '3. Names on the network'
  members=$(docker network inspect -f '{{range .Containers}}  {{println .Name .IPv4Address}}{{end}}' "$project-network")
  echo "$members"
  for service in web postgres redis; do
    claim "$project-$service is on the network $project-network" has "$members" " $project-$service "
  done
else
  title '3. Ports on this machine (only the network of Docker has names for them)'
fi
ping() { run "${web[@]}" ping -c 3 "$1" && printf '    %s\n' "${answer//$'\n'/$'\n    '}"; }
claim "web connects to PostgreSQL at $postgres" ping "$postgres"
claim "web connects to Redis at $redis" ping "$redis"

title '4. Direct access to both servers'
ask 'PostgreSQL answers a query' '[1-9]*' sql 'SHOW server_version'
ask 'Redis answers PING' PONG redis_cli PING

title '5. Service report'
expect 'service is connected to both servers' '200 *"status":"connected"*"status":"connected"' GET /services
say "$body"

verdict
