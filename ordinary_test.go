package main

import (
	"database/sql"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"
)

// What people do to a database in an ordinary year: dumps, imports, altered tables, poolers, connections that die.

// rightWithin reads a path until it says a text, and fails the test if that takes longer than a limit. From then on
// every read must say it, also when the cache answers again.
func (s *testServer) rightWithin(limit time.Duration, path, says string) {
	s.t.Helper()
	within(s.t, s.awaitText(path, says), limit, "the right answer")
	s.awaitHit(path, says)
}

// TestBehindTheTrigger changes rows in ways that the trigger does not report.
func TestBehindTheTrigger(t *testing.T) {
	for name, change := range map[string]string{
		"dump":                ``, // see below
		"triggers off and on": `ALTER TABLE products DISABLE TRIGGER ALL; %s; ALTER TABLE products ENABLE TRIGGER ALL`,
		"off for a moment": `ALTER TABLE products DISABLE TRIGGER products_changed; %s;
			ALTER TABLE products ENABLE ALWAYS TRIGGER products_changed`,
		"one trigger off":  `ALTER TABLE products DISABLE TRIGGER products_changed; %s`,
		"trigger dropped":  `DROP TRIGGER products_changed ON products; %s`,
		"function dropped": `DROP FUNCTION products_notify CASCADE; %s`,
		"replica role":     `SET session_replication_role = replica; %s`,
		"table made anew": `ALTER TABLE products RENAME TO old; ALTER INDEX products_pkey RENAME TO old_pkey;
			CREATE TABLE products (LIKE old INCLUDING ALL); INSERT INTO products TABLE old; DROP TABLE old; %s`,
	} {
		t.Run(name, func(t *testing.T) {
			s := startAlone(t)
			path := s.create(`{"name":"a","price":1,"stock":7}`)
			dump := psqlDump(s.cfg)
			s.want(200, "PUT", path, `{"stock":1}`)
			s.awaitHit(path, "")
			s.awaitHit("/products", "")
			if name == "dump" {
				pgTool(s.cfg, dump, "psql", "-v", "ON_ERROR_STOP=1")
			} else {
				must(s.psql.Exec(fmt.Sprintf(change, `UPDATE products SET stock = 7`)))
			}
			s.rightWithin(1500*time.Millisecond, path, `"stock":7`)
			s.rightWithin(1500*time.Millisecond, "/products", `"stock":7`)
			// Later changes are reported again.
			must(s.psql.Exec(`UPDATE products SET stock = 8`))
			s.rightWithin(1500*time.Millisecond, path, `"stock":8`)
			s.create(`{"name":"b","price":1}`)
		})
	}
}

// TestSchema has a table of an older version, with dates that JSON cannot express, which is locked when the service
// starts. The dates become the nearest that JSON has, and no new ones are accepted. Then it drops the table. It
// drops it again, with a schema that takes longer to apply than a statement may. At last it drops the database. The
// service makes the table again each time.
func TestSchema(t *testing.T) {
	own := alone(t)
	must(own.psql.Exec(schema + `; ALTER TABLE products DROP CONSTRAINT products_dates;
		INSERT INTO products (name, price, created_at, updated_at)
		VALUES ('a', 1, 'infinity', '-infinity'), ('b', 1, '10001-01-01', '0044-03-15 BC')`))
	tx := lock(own.psql, `LOCK TABLE products`)
	s := startReplica(t, own)
	awaitLocks(t, own.psql, 1)
	awaitLocks(t, own.psql, 0) // the schema has given up
	check(tx.Rollback())
	s.awaitText("/products", `"created_at":"9999-12-31T00:00:00Z","updated_at":"0001-01-02T00:00:00Z"`)
	for _, change := range []string{"updated_at = 'infinity'", "created_at = '10001-01-01'", "price = 'NaN'"} {
		_, err := own.psql.Exec("UPDATE products SET " + change)
		expect(t, strings.Contains(fmt.Sprint(err), "(23514)"), "%s: %v", change, err)
	}
	s.want(200, "PUT", "/products/1", `{"stock":1}`)
	s.awaitHit("/products", "")

	time.Sleep(applyInterval) // the schema has just been applied
	must(own.psql.Exec(`DROP TABLE products`))
	s.rightWithin(2*time.Second, "/products", `"count":0`)
	s.wantHealth(200, "healthy", "connected", "connected")
	s.create(`{"name":"b","price":1}`)
	s.awaitHit("/products", "")

	must(own.psql.Exec(`CREATE FUNCTION slow() RETURNS event_trigger LANGUAGE plpgsql
		AS $$ BEGIN PERFORM pg_sleep(3); END $$; CREATE EVENT TRIGGER slow ON ddl_command_end
		WHEN TAG IN ('CREATE INDEX') EXECUTE FUNCTION slow(); DROP TABLE products`))
	s.rightWithin(10*time.Second, "/products", `"count":0`)

	admin := psql(t, testConfig())
	must(admin.Exec(`DROP DATABASE ` + own.postgresDB + ` WITH (FORCE)`))
	s.wantHealth(503, "unhealthy", "disconnected", "connected")
	must(admin.Exec(`CREATE DATABASE ` + own.postgresDB))
	s.rightWithin(4*time.Second, "/products", `"count":0`)
	s.create(`{"name":"c","price":1}`)
}

// TestRoleWithoutPrivileges uses a database in which everything is there and nothing may be created. It connects to the
// Unix socket in a folder, as libpq does.
func TestRoleWithoutPrivileges(t *testing.T) {
	s := startAlone(t)
	role := s.cfg.postgresDB + "_role"
	must(s.psql.Exec(fmt.Sprintf(`CREATE ROLE %[1]s LOGIN PASSWORD 'secret'; REVOKE CREATE ON SCHEMA public FROM PUBLIC;
		GRANT SELECT, INSERT, UPDATE, DELETE ON products TO %[1]s; GRANT ALL ON SEQUENCE products_id_seq TO %[1]s`, role)))
	t.Cleanup(func() { must(s.psql.Exec(`DROP OWNED BY ` + role + `; DROP ROLE ` + role)) })
	own := s.servers
	own.postgresHost, own.postgresUser, own.postgresPassword = folder, role, "secret"
	limited := startServer(t, own)
	limited.create(`{"name":"a","price":1}`)
	limited.awaitHit("/products", "")
}

// TestTakenIDs imports rows with ids of their own: creations succeed at once, also many at a time.
func TestTakenIDs(t *testing.T) {
	s := startAlone(t)
	for _, more := range []string{"", "", " UNION SELECT 9223372036854775807"} {
		must(s.psql.Exec(`INSERT INTO products (id, name, price)
			SELECT id, 'imported', 1 FROM (
				SELECT last + n AS id
				FROM generate_series(1, 200) AS n, (SELECT coalesce(max(id), 0) AS last FROM products) AS ids` + more + `
			) AS taken`))
		concurrently(20, func(int) {
			a, err := s.send("POST", "/products", `{"name":"a","price":1}`)
			expect(t, err == nil && a.status == 201, "%d %s %v", a.status, a.body, err)
		})()
	}
	equal(t, "rows", ask[int](s.psql, `SELECT count(*) FROM products`), 601+60)
}

// TestOpenConnections ends the pool's connections, and changes the types of columns, while all connections are open and
// have prepared their statements. No request notices.
func TestOpenConnections(t *testing.T) {
	s := startAlone(t)
	path := s.create(`{"name":"a","price":1}`)
	const alter, end = "ALTER TABLE products ", `SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
		WHERE datname = current_database() AND application_name = 'desafio3'
		AND query NOT LIKE '%pg_trigger%' AND query NOT LIKE 'LISTEN%'`
	for _, change := range append(slices.Repeat([]string{end}, 10), alter+"ALTER stock TYPE bigint",
		alter+"ADD COLUMN brand text", alter+"ALTER name TYPE varchar(300)", alter+"ALTER price TYPE numeric(12, 2)") {
		for range 2 { // taken for the second time, a connection prepares its statements
			s.takePool()()
		}
		must(s.psql.Exec(change))
		for i := range poolSize {
			s.want(200, "PUT", path, fmt.Sprintf(`{"stock":%d}`, i))
			s.want(201, "POST", "/products", `{"name":"b","price":1}`)
			s.want(200, "GET", "/products?limit=1", "")
		}
		within(t, s.awaitHit(path, ""), 2*time.Second, "the return of the cache")
	}
}

// TestNotNow meets a database that cannot do it now: a 503 that says so, and when to come again. A rule that
// somebody added is no such reason.
//
// The second half changes a row that another session has locked. The first statement times out, and nothing was
// changed. The next one gets the lock, and its time is later than that of the change it waited for. The last one
// loses its connection, so it may have been made: the answer says so, and does not say when to come again.
func TestNotNow(t *testing.T) {
	own := alone(t)
	proxy := startProxy(t, &own.postgresPort, nil)
	s := startServer(t, own)
	path := s.create(`{"name":"a","price":1}`)
	for code, status := range map[string]int{
		"25006": 503, "55P03": 503, "40001": 503, "40P01": 503, "53200": 503, "57014": 503,
		"23503": 409, "P0001": 409,
	} {
		must(s.psql.Exec(`CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
			BEGIN RAISE EXCEPTION USING ERRCODE = '` + code + `'; END $$;
			CREATE OR REPLACE TRIGGER refuse BEFORE UPDATE ON products FOR EACH ROW EXECUTE FUNCTION refuse()`))
		retryAfter := s.want(status, "PUT", path, `{"stock":1}`).header.Get("Retry-After")
		equal(t, "whether it says when to come again", retryAfter == "1", status == 503)
	}
	must(s.psql.Exec(`DROP TRIGGER refuse ON products`))
	tx := lock(s.psql, `LOCK TABLE products`)
	startServer(t, own).wantHealth(200, "healthy", "connected", "connected") // starting needs no lock either
	check(tx.Rollback())

	const lockRow = `SELECT FROM products FOR UPDATE`
	tx = lock(s.psql, lockRow)
	within(t, s.want(503, "PUT", path, `{"stock":5}`).took, 6*time.Second, "the change of a locked row")
	check(tx.Commit())
	s.read(path, stockIs(0))

	tx = lock(s.psql, lockRow)
	wait := concurrently(1, func(int) { s.want(200, "PUT", path, `{"stock":6}`) })
	awaitLocks(t, s.psql, 1)
	first := ask[time.Time](tx, `UPDATE products SET updated_at = clock_timestamp() RETURNING updated_at`)
	check(tx.Commit())
	wait()
	updated := ask[time.Time](s.psql, `SELECT updated_at FROM products`)
	expect(t, !updated.Before(first), "updated at %v, after an update at %v", updated, first)
	s.read(path, stockIs(6))

	tx = lock(s.psql, lockRow)
	wait = concurrently(1, func(int) {
		a := s.want(503, "PUT", path, `{"stock":7}`)
		a.contains("may have been made")
		equal(t, "Retry-After", a.header.Get("Retry-After"), "")
	})
	awaitLocks(t, s.psql, 1)
	proxy.lead(proxy.target)
	wait()
	check(tx.Commit())
}

// awaitLocks waits until so many statements wait for a lock.
func awaitLocks(t *testing.T, db *sql.DB, statements int) {
	t.Helper()
	eventually(t, fmt.Sprint("statements that wait for a lock: ", statements), func() bool {
		return statements == ask[int](db, `SELECT count(*) FROM pg_stat_activity
			WHERE datname = current_database() AND wait_event_type = 'Lock'`)
	})
}

// TestPgBouncer stands a pooler between. In session mode, as it is installed, the cache is used and statements end in
// time. In transaction mode nothing is stale, the cache is not used, and everything works.
func TestPgBouncer(t *testing.T) {
	t.Run("session", func(t *testing.T) {
		s := startServer(t, alone(t).behindPgBouncer(t, "pool_mode = session"))
		path := s.create(`{"name":"a","price":1}`)
		s.awaitHit(path, "")
		must(s.psql.Exec(`UPDATE products SET stock = 2`))
		s.rightWithin(2*time.Second, path, `"stock":2`)
		tx := lock(s.psql, `SELECT FROM products FOR UPDATE`)
		within(t, s.want(503, "PUT", path, `{"stock":3}`).took, 3*time.Second, "a change of a locked row")
		check(tx.Rollback())
		must(s.cache.heartbeatDB.Exec(`RESET statement_timeout`)) // as when a pooler serves it with another connection
		eventually(t, "trust has ended", func() bool { return !s.cache.Trusted() })
	})
	for _, timeout := range []int{0, 2000} { // with the one of the service, only its listener is deaf
		t.Run(fmt.Sprint("transaction ", timeout), func(t *testing.T) {
			own := alone(t)
			must(own.psql.Exec(fmt.Sprintf(`ALTER DATABASE %s SET statement_timeout = %d`, own.postgresDB, timeout)))
			s := startReplica(t, own.behindPgBouncer(t, "pool_mode = transaction"))
			s.wantHealth(200, "degraded", "connected", "connected")
			time.Sleep(settleTime) // until then its Redis keeps it from trust
			for range 10 {
				path := s.create(`{"name":"a","price":1}`)
				concurrently(20, func(int) { s.want(200, "GET", "/products?limit=1", "") })()
				for stock := range 5 {
					must(s.psql.Exec(`UPDATE products SET stock = $1`, stock))
					s.read(path, stockIs(stock), bypass)
				}
				time.Sleep(heartbeat) // gives it the chance to win trust
			}
			equal(t, "trust", s.cache.Trusted(), false)
		})
	}
}

// psqlDump returns what pg_dump makes of a database, to be restored over it.
func psqlDump(cfg config) string { return pgTool(cfg, "", "pg_dump", "--clean", "--if-exists") }

// pgTool runs a program of PostgreSQL's on a database and returns what it prints.
func pgTool(cfg config, input, name string, args ...string) string {
	cmd := exec.Command(program(name), append(args,
		"-h", cfg.postgresHost, "-p", cfg.postgresPort, "-U", cfg.postgresUser, "-d", cfg.postgresDB)...)
	cmd.Env = append(os.Environ(), "PGPASSWORD="+cfg.postgresPassword)
	cmd.Stdin, cmd.Stderr = strings.NewReader(input), os.Stderr
	return string(must(cmd.Output()))
}
