#!/usr/bin/env bash
# Demonstration of what people do to a database in an ordinary year: they restore a dump, import rows with ids, and lose
# idle connections. Each time the service soon returns what PostgreSQL holds, and creates products. It takes seconds. It
# works on its own products, and deletes them in the end. All other products stay as they are, even if another client
# changes them meanwhile.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
attach

dump=$(mktemp) category="demo_restore $$"
at_exit "rm -f '$dump'; delete_ours"
delete_ours() { sql "DELETE FROM products WHERE category = '$category'"; }
# others: a checksum of all other products.
others() { sql "SELECT md5(string_agg(p::text, '' ORDER BY id)) FROM products p WHERE category <> '$category'"; }

# restore: restores the dump, which replaces the whole table. The dump is older than the table, so the other products
# are put back as they were a moment ago, and so is the last id. All this is one transaction that locks the table at its
# beginning, so an interrupt loses nothing. It runs under the service's application name, so the trigger, which the dump
# creates after the data, does not report these rows.
restore() {
  {
    echo "SET application_name = 'desafio3'; BEGIN; LOCK TABLE products; SELECT last_value FROM products_id_seq \\gset"
    echo "CREATE TEMP TABLE others AS SELECT * FROM products WHERE id <> $id;"
    cat "$dump"
    echo "DELETE FROM public.products WHERE id <> $id; INSERT INTO public.products SELECT * FROM pg_temp.others;"
    echo "SELECT setval('public.products_id_seq', :last_value); COMMIT;"
  } | (trap '' INT TERM && postgres_client psql -Xq -v ON_ERROR_STOP=1) >/dev/null
}

title '1. A restored dump'
need_cache
before=$(others)
create_product 'creation returns 201' "{\"name\":\"Café\",\"price\":1.00,\"category\":\"$category\"}"
say '$ pg_dump --clean --if-exists --table products > dump.sql'
postgres_client pg_dump --clean --if-exists --table products </dev/null >"$dump"
expect 'update after the dump returns 200' '200 *"price":2.00,' PUT "/products/$id" '{"price":2.00}'
claim 'new price is cached' cached 2.00
say '$ psql < dump.sql'
restore
restored=$SECONDS
claim 'read returns the restored price within 2 s' wait_for 2 price_is 1.00
say "$(since "$restored")"
expect 'list has the restored price' "200 *\"id\":$id,*\"price\":1.00," GET /products
claim 'cache is in use again' wait_for 20 cache_in_use
claim 'restored price is cached' cached 1.00

title '2. Rows imported with their own ids'
imported=$(sql "INSERT INTO products (id, name, price, category)
  SELECT (SELECT max(id) FROM products) + i, 'Importado '||i, 5, '$category' FROM generate_series(1, 3) i RETURNING id")
say "psql has imported products with the ids ${imported//$'\n'/, }"
expect 'creation returns 201, although the next id is taken' 201 \
  POST /products "{\"name\":\"Chá\",\"price\":1.00,\"category\":\"$category\"}"
claim 'created product has a free id' test "$(field id)" -gt "${imported##*$'\n'}"

title '3. Connections that die while they are idle'
ended=$(sql "SET client_min_messages = error; SELECT count(pg_terminate_backend(pid, 1000))
  FROM pg_stat_activity WHERE application_name = 'desafio3'")
say "PostgreSQL has ended $ended connections of the service"
expect 'update over a dead connection returns 200' '200 *"price":3.00,' PUT "/products/$id" '{"price":3.00}'
expect 'read returns the new price' '200 *"price":3.00,' GET "/products/$id"
claim 'cache is in use again' wait_for 20 cache_in_use

title '4. Clean-up'
expect 'deletion returns 204' 204 DELETE "/products/$id"
delete_ours
claim 'other products are unchanged' is "$(others)" "$before"

verdict
