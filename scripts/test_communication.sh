#!/usr/bin/env bash
# Shows that the services reach each other: what the service writes is looked up in PostgreSQL and in Redis
# themselves. It works on a product of its own, which it deletes in the end.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
attach
at_exit delete_product

title '1. Web to PostgreSQL'
name="Teste de comunicação $$"
create_product 'the service creates a product' "{\"name\":\"$name\",\"price\":10.00}"
ask 'PostgreSQL has it' "$name" sql "SELECT name FROM products WHERE id = $id"

title '2. Web to Redis'
need_cache
request GET "/products/$id"
ask 'Redis holds what the service answered' "$body" redis_cli GET "products:$id"
ask 'for a limited time' '[1-9]*' redis_cli TTL "products:$id"
expect 'the product is deleted' 204 DELETE "/products/$id"
ask 'after a write Redis does not hold it any more' 0 redis_cli EXISTS "products:$id"

# "web ping" tries to connect from where the service runs. In the image it is called ping.
if is "$mode" docker; then
  title '3. Names inside the network'
  members=$(docker network inspect -f '{{range .Containers}}  {{println .Name .IPv4Address}}{{end}}' "$project-network")
  echo "$members"
  for service in web postgres redis; do
    claim "$project-$service is on the network $project-network" has "$members" " $project-$service "
  done
  web=(docker exec "$project-web") postgres=postgres redis=redis
else
  title '3. Ports on this machine (the names "postgres" and "redis" exist only in the network of Docker)'
  web=("$state/web") postgres=127.0.0.1:$POSTGRES_PORT redis=127.0.0.1:$REDIS_PORT
fi
ping() { run "${web[@]}" ping -c 3 "$1" && printf '    %s\n' "${answer//$'\n'/$'\n    '}"; }
claim "\"$postgres\" leads to PostgreSQL" ping "$postgres"
claim "\"$redis\" leads to Redis" ping "$redis"

title '4. Both servers, asked directly'
ask 'PostgreSQL answers' '[1-9]*' sql 'SHOW server_version'
ask 'Redis answers' PONG redis_cli PING

title '5. What the service says of them'
expect 'it is connected to both' '200 *"postgres":{"status":"connected"*"redis":{"status":"connected"' GET /services
say "$body"

verdict
