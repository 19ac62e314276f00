package main

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
)

// The tests of the protocol read and change the stock of one product, in two replicas, at points that they choose.
const productPath = "/products/1"

var productKeys = []string{keyAll, productKey(1)}

// startTwo starts two replicas at one PostgreSQL and, behind a proxy, one Redis. The product has a stock of 0.
func startTwo(t *testing.T) (a, b *testServer) {
	own := alone(t)
	own.proxy = startProxy(t, &own.redisPort, nil)
	a, b = startServer(t, own), startServer(t, own)
	equal(t, "the product", a.create(`{"name":"a","price":1}`), productPath)
	return a, b
}

// stockIs is the part of a body that says so.
func stockIs(stock int) string { return fmt.Sprintf(`"stock":%d,`, stock) }

func (s *testServer) readStock(stock int, sources ...source) {
	s.t.Helper()
	s.read(productPath, stockIs(stock), sources...)
}

// awaitStock reads the stock until it comes from the cache. It must be as given all the time.
func (s *testServer) awaitStock(stock int) (took time.Duration) {
	s.t.Helper()
	return s.awaitHit(productPath, stockIs(stock))
}

// setStock returns a change for cache.Write.
func setStock(stock int) func(context.Context, *sql.Conn) error {
	return func(ctx context.Context, conn *sql.Conn) error {
		_, err := conn.ExecContext(ctx, `UPDATE products SET stock = $1 WHERE id = 1`, stock)
		return classify(err)
	}
}

// write makes a change that must succeed.
func (s *testServer) write(change func(context.Context, *sql.Conn) error) {
	s.t.Helper()
	equal(s.t, "the writer's error", s.cache.Write(s.t.Context(), productKeys, change), nil)
}

// begin runs f in a goroutine until f calls here. Each call of next lets f run until it calls here again, or ends.
func begin(f func(here func())) (next func()) {
	turns := make(chan bool)
	pass := func() { // gives the turn to the other side, and waits until it is back
		turns <- true
		<-turns
	}
	go func() {
		f(pass)
		for {
			pass() // also if the test expected f to stop more often
		}
	}()
	<-turns
	return pass
}

// heldWrite begins a write that stops before and after its statement. What it returns lets it commit and, then, end.
func (s *testServer) heldWrite(stock int) (commit, end func()) {
	next := begin(func(here func()) {
		s.write(func(ctx context.Context, conn *sql.Conn) error {
			here()
			defer here()
			return setStock(stock)(ctx, conn)
		})
	})
	return next, next
}

// heldRead begins a read that stops between its query and its fill, which needs a lease of its own. What it returns
// lets it go on. The read must be a miss with the stock given.
func (s *testServer) heldRead(stock int) (fill func()) {
	return begin(func(here func()) {
		body, from, err := s.cache.Get(s.t.Context(), productKey(1), func(ctx context.Context) ([]byte, error) {
			defer here()
			var p product
			err := p.scan(s.db.QueryRowContext(ctx, selectProduct, 1))
			return must(encode(&p)), err
		})
		ok := err == nil && from == miss && bytes.Contains(body, []byte(stockIs(stock)))
		expect(s.t, ok, "read %s (%s, %v), want a miss with %s", body, from, err, stockIs(stock))
	})
}

// A reader that read the old row fills only after the writer has come and gone.
func TestFillAfterCommit(t *testing.T) {
	a, b := startTwo(t)
	fill := a.heldRead(0)
	b.write(setStock(1))
	fill()
	a.readStock(1)
	b.readStock(1)
}

// A reader with a lease of its own reads the old row while a writer is at work, and fills after the commit: before the
// writer's clean-up, and after it. It can take the lease only if the writer has deleted the old body before its
// statement. So nobody hits that body after the commit, when others have seen the new row.
func TestFillWhileWriting(t *testing.T) {
	twice(t, "after clean-up", func(t *testing.T, afterCleanUp bool) {
		a, b := startTwo(t)
		a.awaitStock(0)
		commit, end := b.heldWrite(1)
		fill := a.heldRead(0)
		commit()
		if afterCleanUp {
			end()
		}
		fill()
		a.readStock(1)
		if !afterCleanUp {
			end()
		}
		a.readStock(1)
	})
}

// Two writers overlap, in both orders; the one that ends first must not open the key for fills.
func TestOverlappingWriters(t *testing.T) {
	twice(t, "last in, first out", func(t *testing.T, lastInFirstOut bool) {
		a, b := startTwo(t)
		commit1, end1 := a.heldWrite(1)
		commit2, end2 := b.heldWrite(1)
		if lastInFirstOut {
			commit1, end1, commit2, end2 = commit2, end2, commit1, end1
		}
		commit1()
		end1()
		a.readStock(1, miss)
		must(a.db.Exec(`UPDATE products SET stock = 0 WHERE id = 1`))
		a.readStock(0) // must not be filled either: the other writer sets it to 1
		a.readStock(0)
		commit2()
		a.readStock(1)
		b.readStock(1)
		end2()
		a.awaitStock(1)
	})
}

// A replica that does not trust its cache announces its writes like any other: it may have lost no more than its
// listener, or have just started, as the one here, which has not even connected to Redis before its first write.
func TestWriteWithoutTrust(t *testing.T) {
	a, _ := startTwo(t)
	starting := &testServer{server: newServer(a.cfg), t: t}
	defer starting.close()
	for stock := 1; stock <= 2; stock++ {
		a.awaitStock(stock - 1)
		starting.write(func(ctx context.Context, conn *sql.Conn) error {
			equal(t, "marks", a.redis.do("EXISTS", writersKey(keyAll), writersKey(productKey(1))), any(int64(2)))
			equal(t, "trust", starting.cache.Trusted(), false)
			return setStock(stock)(ctx, conn)
		})
		a.readStock(stock)
	}
}

// A writer dies after its commit: it leaves empty keys and a mark that expires, never a stale body.
func TestWriterDies(t *testing.T) {
	a, b := startTwo(t)
	a.awaitStock(0)
	check(b.cache.runWriterScript(announceScript, productKeys, "dead"))
	fill := a.heldRead(0) // reads the old row
	must(b.db.Exec(`UPDATE products SET stock = 1 WHERE id = 1`))
	fill()
	a.readStock(1)
	a.readStock(1, miss) // nothing is filled under a dead writer's mark
	// The mark lasts markLife from when Redis took it, on Redis's own clock.
	now := must(redis.Int64s(a.redis.try("TIME")))[0]
	left := must(redis.Int64(a.redis.try("ZSCORE", writersKey(productKey(1)), "dead"))) - now
	life := int64(markLife.Seconds())
	expect(t, left >= life-5 && left <= life, "the mark lasts for %d s more", left)
	a.redis.do("ZADD", writersKey(productKey(1)), now-1, "dead")
	a.readStock(1)
	a.readStock(1, hit)
}

// What PostgreSQL refused is known not to have happened: the cache is in use again at once. When the connection breaks
// under a writer, its change may yet be committed, and here it is.
func TestFailedWrites(t *testing.T) {
	a, b := startTwo(t)
	err := a.cache.Write(t.Context(), productKeys, setStock(-1)) // the table's CHECK refuses it
	expect(t, errors.Is(err, errUnchanged) && !unavailable(err), "the writer got %v", err)
	a.readStock(0)
	a.readStock(0, hit)
	lost := errors.New("the connection broke")
	err = a.cache.Write(t.Context(), productKeys, func(context.Context, *sql.Conn) error { return lost })
	expect(t, errors.Is(err, lost) && errors.Is(err, errOutcomeUnknown), "the writer got %v", err)
	a.readStock(0)
	a.readStock(0, miss)
	must(b.db.Exec(`UPDATE products SET stock = 1 WHERE id = 1`))
	a.readStock(1)
}

// A writer gets its connection so late that its mark might expire before the commit: it announces itself again.
func TestLateWriter(t *testing.T) {
	s := startAlone(t)
	path := s.create(`{"name":"a","price":1}`)
	giveBack := s.takePool()
	wait := concurrently(1, func(int) { s.want(200, "PUT", path, `{"stock":1}`) })
	eventually(t, "the writer is announced", func() bool { return s.redis.do("EXISTS", writersKey(keyAll)) == int64(1) })
	time.Sleep(sendTimeout) // its announcement began before this, so it is too old afterwards
	giveBack()
	wait()
	var marks int // one for the creation, and two for each announcement of the change
	info := must(redis.String(s.redis.try("INFO commandstats")))
	must(fmt.Sscanf(infoField(info, "cmdstat_zadd"), "calls=%d", &marks))
	equal(t, "marks that were set", marks, 1+2*2)
}

// lookup returns the product's newest lookup: the one that waits or, if none does, the one that runs.
func (s *testServer) lookup() *lookup {
	s.cache.lookups.mu.Lock()
	defer s.cache.lookups.mu.Unlock()
	return s.cache.lookups.newest[productKey(1)]
}

// A request that comes after a write must not join a lookup that has read the row before it.
func TestJoinOnlyLaterLookups(t *testing.T) {
	a, b := startTwo(t)
	finish := a.heldRead(0)
	early := a.lookup()
	b.write(setStock(1))
	wait := concurrently(10, func(int) { a.readStock(1) })
	eventually(t, "a lookup waits", func() bool { return a.lookup() != early })
	finish()
	wait()
}

// A miss is answered before the key is filled, so that a Redis which is unresponsive just then delays nobody. The next
// lookup of the key begins after the fill. It finds the same bytes, and returns the copy of the first.
func TestAnsweredBeforeFill(t *testing.T) {
	a, _ := startTwo(t)
	answer := a.heldRead(0)
	first := a.lookup()
	a.proxy.pause(true)
	began := time.Now()
	answer()
	within(t, time.Since(began), redisTimeout/2, "a miss that need not wait for its fill")
	wait := concurrently(1, func(int) { a.readStock(0, hit) })
	eventually(t, "a lookup waits", func() bool { return a.lookup() != first })
	second := a.lookup()
	a.proxy.pause(false)
	wait()
	equal(t, "the second body", &second.body[0], &first.body[0])
}

// Redis comes back with a snapshot from before a write. Replica b notices that its connections break. Replica a has
// none at that time, and notices that another Redis answers.
func TestOldSnapshot(t *testing.T) {
	a, b := startTwo(t)
	a.awaitStock(0)
	a.redis.do("SAVE")
	b.write(setStock(1))
	a.awaitStock(1) // no fill is under way any more, which would connect again
	a.stopCache()
	a.cache.redis.pool.IdleTimeout = time.Nanosecond // the pool drops its connection before it could break
	a.redis.restart()
	snapshot := must(redis.String(a.redis.try("GET", productKey(1))))
	expect(t, strings.Contains(snapshot, stockIs(0)), "the snapshot has %s", snapshot)
	equal(t, "whether replica a trusts its cache still", a.cache.Trusted(), true)
	a.readStock(1)
	b.readStock(1)
	within(t, b.awaitStock(1), settleTime+2*time.Second, "the return of the cache")
	a.readStock(1)
}

// Redis is restarted under a writer, or another takes its place, and the writer's mark is lost with it. No replica uses
// the new one while the writer may still commit, and a replica that has just started does not either. Meanwhile all
// read from PostgreSQL.
func TestNewRedisSettles(t *testing.T) {
	twice(t, "restarted", func(t *testing.T, restarted bool) {
		a, b := startTwo(t)
		others := []*testServer{b}
		commit, end := a.heldWrite(1)
		began := time.Now()
		if restarted {
			a.redis.restart()
			others = append(others, startReplica(t, a.servers))
		} else {
			a.proxy.lead("127.0.0.1:" + a.withNewRedis(t).redisPort)
		}
		for time.Since(began) < sendTimeout+statementTimeout-time.Second { // nearly as late as a writer may commit
			for _, s := range others {
				s.readStock(0, miss, bypass)
			}
		}
		commit()
		for _, s := range append(others, a) {
			s.readStock(1)
		}
		end()
		for _, s := range others {
			s.awaitStock(1)
		}
		took := time.Since(began)
		expect(t, took >= settleTime && took <= settleTime+2*time.Second, "the cache was in use again after %v", took)
	})
}

// One replica cannot reach Redis and writes; the others can, and hold the old body.
func TestWriteWithoutRedis(t *testing.T) {
	a, b := startTwo(t)
	b.readStock(0)
	unreachable := a.servers
	unreachable.redisPort = "1"
	c := startReplica(t, unreachable)
	for stock := 1; stock <= 20; stock++ {
		c.write(setStock(stock))
		// The notification was sent before the write returned; what is left is its way to the other replicas.
		a.awaitText(productPath, stockIs(stock))
		b.awaitText(productPath, stockIs(stock))
	}
	c.readStock(20, bypass)
}

// Redis is unreachable, or unresponsive, while a replica writes. It returns before the second write commits, and has
// forgotten nothing. When it responds again, it executes the commands that it received meanwhile. Another replica may
// then fill the old row. The writer's own replica does not use the cache until it has committed, and then deletes that.
func TestUnreachableRedisUnderWriter(t *testing.T) {
	twice(t, "silent", func(t *testing.T, silent bool) {
		a, b := startTwo(t)
		other := a.create(`{"name":"other","price":1}`)
		a.awaitStock(0)
		leave, comeBack := func() { a.proxy.lead("") }, func() { a.proxy.lead(a.proxy.target) }
		if silent {
			leave, comeBack = func() { a.proxy.pause(true) }, func() { a.proxy.pause(false) }
		}
		leave()
		b.write(setStock(1))
		commit, end := b.heldWrite(2)
		comeBack()
		within(t, a.awaitHit(other, ""), 2*time.Second, "the return of the cache")
		a.readStock(1)
		eventually(t, "b waits", func() bool { return strings.Contains(fmt.Sprint(b.cache.restore()), "still active") })
		commit()
		end()
		b.awaitStock(2)
		a.awaitStock(2)
	})
}

// listeners is a query for the processes that serve the replicas' listeners.
const listeners = `FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'LISTEN%'`

// Another session changes a row: by a statement, by many rows at once, by TRUNCATE, and while the listeners lose their
// connections, and the notification with them. They are back before anybody asks or, the last time, only after it.
func TestOtherSessions(t *testing.T) {
	a, b := startTwo(t)
	const anew = `INSERT INTO products (id, name, price, stock) VALUES (1, 'a', 1, `
	const cut = `SELECT pg_terminate_backend(pid) ` + listeners + `; UPDATE products SET stock = `
	for i, change := range []string{
		`UPDATE products SET stock = 1`,
		`INSERT INTO products (name, price) SELECT 'p' || n, n FROM generate_series(1, 10000) n;
			UPDATE products SET stock = 2`,
		`TRUNCATE products; ` + anew + `3)`,
		`DELETE FROM products; ` + anew + `4)`,
		cut + `5`, cut + `6`, cut + `7`,
	} {
		within(t, a.awaitStock(i)+b.awaitStock(i), 5*time.Second, "the return of the cache")
		must(a.psql.Exec(change))
		a.awaitText(productPath, stockIs(i+1))
		b.awaitText(productPath, stockIs(i+1))
	}
	var deletions int
	info := must(redis.String(a.redis.try("INFO commandstats")))
	must(fmt.Sscanf(infoField(info, "cmdstat_unlink"), "calls=%d", &deletions))
	expect(t, deletions <= 1000, "%d deletions: each replica must drop everything once for 10,000 changes", deletions)

	a.awaitStock(7)
	const connections = `UPDATE pg_database SET datallowconn = %t WHERE datname = current_database()`
	must(a.psql.Exec(fmt.Sprintf(connections, false)))
	must(a.psql.Exec(`SELECT pg_terminate_backend(pid) ` + listeners))
	eventually(t, "trust has ended", func() bool { return !a.cache.Trusted() && !b.cache.Trusted() })
	must(a.psql.Exec(`UPDATE products SET stock = 8`))
	must(a.psql.Exec(fmt.Sprintf(connections, true)))
	a.awaitStock(8)
	b.awaitStock(8)
}

// A connection breaks in the middle of a batch of commands: those before were answered, and only the others fail.
func TestBrokenBatch(t *testing.T) {
	s := startAlone(t)
	epoch := s.cache.trust.epoch.Load()
	batch := []*command{{name: "PING"}, {name: "QUIT"}, {name: "PING"}} // Redis answers QUIT, and closes the connection
	s.cache.redis.exchange(batch)
	ok := batch[0].err == nil && batch[1].err == nil && batch[2].err != nil
	expect(t, ok, "the errors are %v, %v and %v", batch[0].err, batch[1].err, batch[2].err)
	expect(t, s.cache.trust.epoch.Load() != epoch, "the error of a command did not end trust")
}
