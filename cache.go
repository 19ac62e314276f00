package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// A cache keeps response bodies in Redis, and it never lies: each body that it returns could as well have come from
// PostgreSQL at that moment. Handlers call Get and Write. Run must be running.
//
// The pattern is cache-aside. A reader asks Redis first; on a miss it asks PostgreSQL and fills the key. A writer
// changes PostgreSQL and deletes the key. The pattern as such returns stale data, because neither server knows about
// the other. Four rules fix it. The code in parentheses explains each:
//
//  1. A fill needs a lease and no active writer (fillScript, announceScript).
//  2. The database reports changes made outside the API, and the service keeps checking that it can (verifier).
//  3. When in doubt, drop everything, and let a new Redis settle (distrust, restore).
//  4. Join only a lookup that has not started (Get).
//
// The first two come from "Scaling Memcache at Facebook" (NSDI 2013).
type cache struct {
	cacheConfig
	trust   *trust
	redis   *redisClient
	lookups lookups

	unannounced atomic.Int64             // writers at work whose announcement failed
	requests    map[source]*atomic.Int64 // responses since this process started
}

// A cacheConfig holds what a cache depends on.
type cacheConfig struct {
	db            *sql.DB      // the pool that serves requests
	heartbeatDB   *sql.DB      // one connection, opened like the pool's: an exhausted pool is no reason for doubt
	mayPrepare    *atomic.Bool // set by the verifier while each connection is one PostgreSQL session: no pooler mixes
	newListener   func(pq.EventCallbackType) *pq.Listener
	applySchema   func(context.Context) error
	redisAddress  string
	redisPassword string
	ttl           time.Duration
}

// The protocol's times.
const (
	heartbeat        = 200 * time.Millisecond  // how often each server is checked
	heartbeatTimeout = time.Second             // for PostgreSQL's answer to a check
	redisTimeout     = 700 * time.Millisecond  // for a round trip to Redis, including a new connection
	statementTimeout = 2 * time.Second         // PostgreSQL ends a statement after this
	poolTimeout      = 2500 * time.Millisecond // to wait for a free connection of a pool
	lookupTimeout    = 2750 * time.Millisecond // for a lookup's query, including poolTimeout
	leaseLife        = 5 * time.Second         // longer than a lookup may take
	sendTimeout      = 1500 * time.Millisecond // from a writer's announcement until it sends its statement
	markLife         = 12 * time.Second
	noticeTime       = redisTimeout + 2*heartbeat // until every replica has noticed a new Redis
	settleTime       = 5 * time.Second
	applyInterval    = 2 * time.Second // between two attempts to apply the schema
)

// The times depend on one another. Each line below compiles only if the value that it converts is not negative.
//
// A mark must outlast its writer's statement. The statement is sent up to sendTimeout after the announcement and runs
// for up to statementTimeout. A reader that read the old row may then hold its lease for leaseLife. The extra second
// is for Redis's clock, which the scripts read in whole seconds.
const _ = uint64(markLife - (sendTimeout + statementTimeout + leaseLife + time.Second))

// A Redis that has just started lacks the marks of writers that announced themselves to its predecessor. The cache
// does not use it until the last of them has finished. Every replica notices the new Redis within noticeTime. After
// that, an announced statement ends within sendTimeout and statementTimeout.
const _ = uint64(settleTime - (noticeTime + sendTimeout + statementTimeout))

// A writer that has waited for an unresponsive Redis must still have time to send its statement. Otherwise it would
// announce itself again and again.
const _ = uint64(sendTimeout - 2*redisTimeout)

const (
	keyAll      = "products:all"
	keyPrefix   = "products:"
	leasePrefix = "lease:" // no body starts with this: bodies start with a brace
)

// writersKey names the sorted set that holds the marks of a key's active writers.
func writersKey(key string) string { return "writers:" + key }

// A source says where a body came from, as the header Cache-Status does (RFC 9211).
type source string

const (
	hit    source = "redis; hit"
	miss   source = "redis; fwd=miss"
	bypass source = "redis; fwd=bypass" // the cache did not ask Redis, or did not use its reply
)

// newCache returns a cache that has not connected to any server yet.
func newCache(cfg cacheConfig) *cache {
	t := &trust{}
	t.epoch.Store(1) // no epoch is trusted yet
	return &cache{
		cacheConfig: cfg,
		trust:       t,
		redis:       newRedisClient(cfg.redisAddress, cfg.redisPassword, t),
		lookups:     lookups{newest: map[string]*lookup{}},
		requests:    map[source]*atomic.Int64{hit: {}, miss: {}, bypass: {}},
	}
}

// ---------------------------------------------------------------- reading

// A lookup finds the body for one key, once. Requests that arrived before it started share its result. The result is
// ready when done is closed.
type lookup struct {
	fillFrom func(context.Context) ([]byte, error)
	started  bool   // guarded by the mutex of lookups
	previous []byte // the body that the previous lookup found
	done     chan struct{}
	body     []byte
	source   source
	err      error
}

// finish hands the result to the callers. If the body equals the previous lookup's, finish reuses that slice. So
// callers that receive the same bytes share one copy, even across lookups.
func (l *lookup) finish(body []byte, from source, err error) {
	if bytes.Equal(body, l.previous) {
		body = l.previous
	}
	l.body, l.source, l.err = body, from, err
	close(l.done)
}

// lookups combines requests for the same key. For each key, at most one lookup runs and one waits. A request joins
// only a lookup that starts after the request arrived.
type lookups struct {
	mu     sync.Mutex
	newest map[string]*lookup // by key: the waiting lookup or, if none waits, the running one
}

// join returns the lookup to wait for, and whether the caller must start it.
func (ls *lookups) join(key string, fillFrom func(context.Context) ([]byte, error)) (l *lookup, start bool) {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	l = ls.newest[key]
	idle := l == nil
	if idle || l.started {
		l = &lookup{fillFrom: fillFrom, started: idle, done: make(chan struct{})}
		ls.newest[key] = l
	}
	return l, idle
}

// endTurn ends l's turn. It marks the lookup that waits behind l as started and returns it, or nil if none waits.
func (ls *lookups) endTurn(key string, l *lookup) *lookup {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	next := ls.newest[key]
	if next == l {
		delete(ls.newest, key)
		return nil
	}
	next.started, next.previous = true, l.body
	return next
}

// Get returns the body for key and its source: Redis, or else fillFrom, which must query PostgreSQL. The body is never
// older than this call, nor than any body returned before it. Callers share the body and must not change it. The error
// is fillFrom's, ctx's, or context.DeadlineExceeded. A call lasts for two lookups at most: one that it waits for, and
// its own.
func (c *cache) Get(ctx context.Context, key string,
	fillFrom func(context.Context) ([]byte, error)) ([]byte, source, error) {
	// Rule 4: join only a lookup that has not started. A thousand requests for one key must not cost a thousand
	// queries. But joining a query that already runs, as the package singleflight does, would return stale data:
	//
	//	reader A queries PostgreSQL and gets 1.00; the answer is on its way
	//	a writer sets the price to 2.00, and its client gets the confirmation
	//	that client reads, joins reader A's query, and gets 1.00
	//
	// So one lookup of a key runs, and one waits for its turn. New requests join the one that waits. A lookup outlives
	// the request that started it. It ends on its own, so callers need no timers, which would slow down every hit.
	l, start := c.lookups.join(key, fillFrom)
	if start {
		c.lookUp(key, l) // not in a new goroutine: a hit is too cheap for one
	}
	select {
	case <-l.done:
	case <-ctx.Done():
		return nil, bypass, ctx.Err()
	}
	c.requests[l.source].Add(1)
	return l.body, l.source, l.err
}

// lookUp runs a lookup. It asks Redis first, with one command that returns what the key holds. If the key is empty,
// the same command takes the lease. On a miss, a new goroutine queries PostgreSQL.
func (c *cache) lookUp(key string, l *lookup) {
	epoch := c.trust.epoch.Load()
	if !c.trust.trustedIn(epoch) {
		go c.fillFromDatabase(key, l, bypass, "")
		return
	}
	token := leasePrefix + rand.Text()
	reply, err := c.redis.do("SET", key, token, "NX", "GET", "EX", int(leaseLife.Seconds()))
	held, _ := reply.([]byte)
	switch {
	case err != nil || c.trust.epoch.Load() != epoch: // Redis may have restarted with an old snapshot and then replied
		go c.fillFromDatabase(key, l, bypass, "")
	case held == nil:
		go c.fillFromDatabase(key, l, miss, token)
	case bytes.HasPrefix(held, []byte(leasePrefix)): // the lease of another reader, which will fill the key
		go c.fillFromDatabase(key, l, miss, "")
	default:
		l.finish(held, hit, nil)
		c.startNext(key, l)
	}
}

// fillFromDatabase is the second half of a lookup. It queries PostgreSQL and hands the result to the callers, or an
// error after lookupTimeout. Then it fills the key if this lookup holds the lease. It does not cache an error: it gives
// the lease back instead.
func (c *cache) fillFromDatabase(key string, l *lookup, from source, token string) {
	ctx, cancel := context.WithTimeout(context.Background(), lookupTimeout)
	defer cancel()
	// A query may notice late that PostgreSQL is unresponsive. Neither these callers nor the next lookup wait for it.
	stopTimer := context.AfterFunc(ctx, func() {
		l.finish(nil, from, ctx.Err())
		c.startNext(key, l)
	})
	body, err := recovered(ctx, l.fillFrom)
	if !stopTimer() {
		return // too late: the timer has finished this lookup, and its lease expires
	}
	l.finish(body, from, err) // before the fill, so that no caller waits for an unresponsive Redis
	if token != "" {          // the error can be ignored, because do has already ended trust
		_, _ = c.redis.do("EVAL", fillScript, 2, key, writersKey(key), token, l.body, int(c.ttl.Seconds()))
	}
	c.startNext(key, l)
}

// recovered calls f and turns a panic into an error, so that it does not end the process. net/http recovers panics
// only in the goroutines of handlers.
func recovered(ctx context.Context, f func(context.Context) ([]byte, error)) (body []byte, err error) {
	defer func() {
		if p := recover(); p != nil {
			body, err = nil, fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	if body, err = f(ctx); err != nil {
		return nil, err
	}
	return body, nil
}

// startNext starts the lookup that waits behind l, if any.
func (c *cache) startNext(key string, l *lookup) {
	if next := c.lookups.endTurn(key, l); next != nil {
		go c.lookUp(key, next)
	}
}

// fillScript is the reader's side of rule 1. A fill needs the lease. Without one, cache-aside is stale for a whole TTL:
//
//	reader:  finds no body, asks PostgreSQL, and gets the price 1.00
//	writer:  sets the price to 2.00, deletes the key, and answers its client
//	reader:  fills the key with 1.00
//
// Here the reader has left its token in the key. The writer's deletion removes the token, so the fill is refused. A
// lease expires, so a reader that dies does not keep the key empty forever.
//
// A fill also needs that no writer is active. The reader may have arrived between the writer's deletion and its
// commit, and then it holds a new lease and an old row. An empty body gives the lease back. So does a body that does
// not fit into Redis's memory, which is no error.
const fillScript = `
	local key, writers, token, body, ttl = KEYS[1], KEYS[2], ARGV[1], ARGV[2], ARGV[3]
	if redis.call('GET', key) ~= token then return end
	redis.call('ZREMRANGEBYSCORE', writers, '-inf', '(' .. redis.call('TIME')[1])
	if body == '' or redis.call('EXISTS', writers) == 1 or redis.pcall('SET', key, body, 'EX', ttl).err then
		redis.call('DEL', key)
	end`

// ---------------------------------------------------------------- writing

// announceScript announces a writer before its SQL. It adds the writer's mark to the sorted set of each key and deletes
// the keys. The deletion comes before the commit so that no reader goes back in time:
//
//	writer:    commits the price 2.00; Redis still holds 1.00
//	reader A:  asks a replica that bypasses Redis, and gets 2.00
//	reader B:  starts after A has its answer, hits, and gets 1.00
//
// The mark's score is its expiry time, in case the writer dies before it removes the mark. The time is on Redis's own
// clock. A script is atomic, like MULTI, but can read that clock. The sets have no TTL, because a Redis that evicts
// keys with a TTL to free memory must not evict marks.
const announceScript = `
	local expires = redis.call('TIME')[1] + ARGV[2]
	for i = 1, #KEYS, 2 do
		redis.call('ZADD', KEYS[i + 1], expires, ARGV[1])
		redis.call('DEL', KEYS[i])
	end`

// retractScript retracts a writer's announcement after its SQL. It removes only the writer's own mark, because other
// writers may still be active. It also deletes the keys again. Otherwise a reader that took the lease and read the old
// row before the commit could fill the key once the mark is gone.
const retractScript = `
	for i = 1, #KEYS, 2 do
		redis.call('ZREM', KEYS[i + 1], ARGV[1])
		redis.call('DEL', KEYS[i])
	end`

// Errors of changes. A change's error wraps errUnchanged if certainly nothing was changed. It wraps errRepeat if, in
// addition, another attempt would succeed at once. Write's error wraps errOutcomeUnknown if neither is known: the
// change may have been made.
var (
	errUnchanged      = errors.New("nothing was changed")
	errRepeat         = fmt.Errorf("repeat it: %w", errUnchanged)
	errOutcomeUnknown = errors.New("outcome unknown")
)

// Write runs change, which must send one statement, to change the rows behind keys. Once Write has returned, or any
// client has seen the new rows, no reader gets an old body from the cache. The end of ctx stops only the wait for a
// connection, never a change halfway. The error is change's or a connection error.
func (c *cache) Write(ctx context.Context, keys []string, change func(context.Context, *sql.Conn) error) error {
	for token := rand.Text(); ; {
		err := c.announceAndChange(ctx, keys, token, change)
		// If the outcome is unknown, the statement may yet commit, so its marks stay until they expire. If the
		// retraction fails, the marks stay too, and no reader can fill. If the announcement failed, Redis may have
		// returned meanwhile, and readers may have filled: the retraction deletes that before the client is answered.
		if !errors.Is(err, errOutcomeUnknown) {
			_ = c.runWriterScript(retractScript, keys, token)
		}
		if !errors.Is(err, errRepeat) { // each errRepeat has dropped a connection from the pool, so the loop ends
			return err
		}
	}
}

// announceAndChange is the writer's side of rule 1. It announces the writer and changes the rows; Write then retracts.
// From before the commit until after it no reader can fill, so every read comes from PostgreSQL. A writer that dies in
// between leaves empty keys and marks that expire, but never an old body.
func (c *cache) announceAndChange(ctx context.Context, keys []string, token string,
	change func(context.Context, *sql.Conn) error) error {
	// The change gets one connection and not the pool, which would send the statement again if a connection breaks. The
	// pool is the bottleneck of changes, so a writer has its connection only for its statement: it takes it after the
	// announcement, and returns it before the retraction.
	announced, sendDeadline := c.announce(keys, token)
	waiting, cancel := context.WithTimeout(ctx, poolTimeout)
	defer cancel()
	conn, err := c.db.Conn(waiting)
	if err != nil {
		return err
	}
	defer conn.Close()
	// After a long wait, or if the process was paused, the mark might expire before the commit.
	for time.Now().After(sendDeadline) {
		announced, sendDeadline = c.announce(keys, token)
	}
	ctx = context.WithoutCancel(ctx)
	if !announced {
		// No mark keeps readers from filling the old row until this change commits. So restore waits for it. Count it
		// before distrust: restore then finds either this writer or a new epoch.
		c.unannounced.Add(1)
		defer c.unannounced.Add(-1)
		c.trust.distrust(errors.New("a writer could not announce itself")) // cached bodies are about to become stale
		// Under another application_name, the trigger of rule 2 reports this change like any other session's.
		if _, err := conn.ExecContext(ctx, `SET application_name = 'desafio3 without redis'`); err != nil {
			return err
		}
		// If this fails, the trigger also reports later changes on this connection, which is harmless.
		defer func() { _, _ = conn.ExecContext(ctx, `RESET application_name`) }()
	}
	err = change(ctx, conn)
	if err != nil && !errors.Is(err, errUnchanged) {
		err = fmt.Errorf("%w: %w", errOutcomeUnknown, err)
	}
	return err
}

// announce returns whether Redis has the writer's marks, and until when the writer may send its statement.
func (c *cache) announce(keys []string, token string) (announced bool, sendDeadline time.Time) {
	sendDeadline = time.Now().Add(sendTimeout)
	return c.runWriterScript(announceScript, keys, token) == nil, sendDeadline
}

// runWriterScript runs announceScript or retractScript for the keys.
func (c *cache) runWriterScript(script string, keys []string, token string) error {
	args := []any{script, 2 * len(keys)}
	for _, key := range keys {
		args = append(args, key, writersKey(key))
	}
	_, err := c.redis.do("EVAL", append(args, token, int(markLife.Seconds()))...)
	return err
}

// ---------------------------------------------------------------- trust

// A trust decides whether the cache may be used. It may be used only in an epoch in which PostgreSQL was verified (rule
// 2) and all keys were dropped (rule 3). Every doubt starts a new epoch. So a doubt that arises during restore is never
// lost: restore trusts only the epoch in which it began.
type trust struct{ epoch, verifiedEpoch, trustedEpoch atomic.Uint64 }

func (t *trust) trustedIn(epoch uint64) bool { return t.trustedEpoch.Load() == epoch }
func (t *trust) trusted() bool               { return t.trustedIn(t.epoch.Load()) }

// distrust ends trust. Reads go straight to PostgreSQL, without waiting for Redis, until restore has dropped every key.
// Writes do not depend on trust: they announce themselves whenever Redis answers.
func (t *trust) distrust(reason error) {
	// Rule 3: when in doubt, drop everything. Doubt follows a Redis error, a different Redis process that answers, or
	// notifications that may be lost. Any body may then be stale:
	//
	//	Redis holds the price 1.00 and saves a snapshot
	//	a writer sets the price to 2.00 and deletes the key
	//	Redis is killed, restarts, loads its snapshot, and holds 1.00 again
	if epoch := t.epoch.Add(1); t.trustedIn(epoch - 1) {
		slog.Warn("cache not trusted", "reason", reason)
	}
}

// Run keeps the cache trusted until the context ends: it checks both servers, restores trust after a doubt, and handles
// the changes that other sessions make.
func (c *cache) Run(ctx context.Context) {
	v := &verifier{cache: c, heard: make(chan string, 1), ownChannel: "heartbeat_" + rand.Text()}
	v.listener = c.newListener(func(event pq.ListenerEventType, err error) {
		if event == pq.ListenerEventDisconnected {
			c.trust.distrust(fmt.Errorf("the listener lost PostgreSQL: %w", err))
		}
	})
	defer v.listener.Close()
	defer c.heartbeatDB.Close()
	go v.handleNotifications()
	go repeat(ctx, "database not ready", func() error { return v.verify(ctx) })
	repeat(ctx, "cache not in use yet", func() error {
		if err := c.redis.ping(); err != nil || c.trust.trusted() {
			return err
		}
		return c.restore()
	})
}

// repeat calls f at every heartbeat until the context ends. It logs an error, but not if the previous call returned the
// same one.
func repeat(ctx context.Context, what string, f func() error) {
	tick := time.Tick(heartbeat)
	for last := ""; ctx.Err() == nil; <-tick {
		err := f()
		if reason := fmt.Sprint(err); err == nil {
			last = ""
		} else if reason != last && ctx.Err() == nil {
			slog.Warn(what, "reason", reason)
			last = reason
		}
	}
}

// restore makes the cache trusted again, or returns the reason why it cannot yet. Redis must have settled, and
// PostgreSQL must have been verified since the last doubt. Then restore drops all keys. If a new doubt arises
// meanwhile, the cache stays untrusted, and the next heartbeat starts over.
func (c *cache) restore() error {
	epoch := c.trust.epoch.Load()
	// Why a new Redis must settle:
	//
	//	writer:    announces itself; its statement is on the way to PostgreSQL
	//	Redis:     is killed and restarted: the mark is gone
	//	reader:    trusts the new Redis, takes a lease, reads the old row, and fills, because it finds no mark
	//	writer:    commits; until it retracts, some readers get the new row while others hit the old one
	//
	// After settleTime, no writer that announced itself to the previous Redis can still commit.
	if !c.redis.settled() {
		return errors.New("redis has just started or come back: it has to settle")
	}
	if c.trust.verifiedEpoch.Load() != epoch {
		return errors.New("PostgreSQL is not verified yet")
	}
	if c.unannounced.Load() > 0 {
		return errors.New("a writer that could not announce itself is still active")
	}
	// A Redis that is full, or is only a replica, refuses writes. This finds out now, before the first request does.
	if _, err := c.redis.do("SET", keyPrefix+"probe", "", "EX", 1); err != nil {
		return err
	}
	if _, err := c.redis.onAllKeys("UNLINK", time.Hour); err != nil { // Redis may hold millions of other programs' keys
		return err
	}
	c.trust.trustedEpoch.Store(epoch) // no longer the current epoch if a doubt arose meanwhile
	if c.trust.trusted() {
		slog.Info("cache trusted")
	}
	return nil
}

// A verifier receives PostgreSQL's notifications and checks that none can be missing. Whatever breaks an assumption of
// rule 2 ends trust: a restored dump, a trigger that was briefly off, a pooler that drops statement_timeout or
// notifications.
type verifier struct {
	*cache
	listener   *pq.Listener
	heard      chan string // the last notification that this process sent to itself and received
	ownChannel string      // the channel that carries them

	schemaApplied   bool      // apply has finished, and the triggers have not gone missing since
	appliedAt       time.Time // when apply last tried
	applyError      error     // what that attempt returned
	triggerIdentity string    // the triggers' identity when they were last seen
	withoutTriggers int       // heartbeats in a row that found them missing or off
	notifiedAt      time.Time // when this process last notified itself
}

// handleNotifications deletes the keys of rows that other sessions changed. This is rule 2: the database reports
// changes made outside the API. For example, an administrator sets the price to 2.00 with psql, and the trigger in
// schema.sql sends the id.
func (v *verifier) handleNotifications() {
	queue := v.listener.Notify
	for n := range queue {
		switch {
		case n == nil: // the listener has reconnected; trust ended when it lost its connection
		case n.Channel == v.ownChannel:
			select {
			case <-v.heard: // nobody waits for an older one
			default:
			}
			v.heard <- n.Extra
		case n.Extra == "" || len(queue) == cap(queue) || len(queue) > 0 && !v.trust.trusted():
			// If ids arrive faster than their keys can be deleted, restore drops all keys once the flood is over.
			// Steady changes do not prevent that: their keys are deleted one by one, even while trust is lost.
			v.trust.distrust(errors.New("other sessions changed everything, or too much to delete key by key"))
		default:
			_, _ = v.redis.do("UNLINK", keyAll, keyPrefix+n.Extra) // after an error, restore drops all keys
		}
	}
}

// selectGuards reads what rule 2 relies on: the identity of the triggers, whether they fire in every session, and the
// effective statement_timeout. It also sends the service's own notification if $2 is not empty. It works even if the
// table is locked or missing. oid and xmin identify a trigger and its function: they change if either is recreated, or
// the trigger is switched off and on.
const selectGuards = `
SELECT coalesce(string_agg(concat_ws('.', t.oid, t.xmin, f.oid, f.xmin), ' ' ORDER BY t.tgname), ''),
       coalesce(string_agg(t.tgenabled::text, '' ORDER BY t.tgname), ''),
       (1000 * extract(epoch FROM current_setting('statement_timeout')::interval))::bigint,
       coalesce(CASE WHEN $2 <> '' THEN pg_notify($1, $2) END::text, '')
FROM pg_trigger AS t
JOIN pg_proc AS f ON f.oid = t.tgfoid
WHERE t.tgrelid = to_regclass('products') AND t.tgname IN ('products_changed', 'products_truncated')`

// verify checks PostgreSQL once and records the result. If it returns an error, it has ended trust, unless ctx is done.
func (v *verifier) verify(ctx context.Context) error {
	epoch := v.trust.epoch.Load()
	err := v.inspect(ctx, epoch)
	switch {
	case err == nil:
		v.trust.verifiedEpoch.Store(epoch)
	case ctx.Err() == nil:
		v.trust.distrust(err)
	}
	v.mayPrepare.Store(err == nil)
	return err
}

// inspect returns an error if an assumption of rule 2 does not hold. It applies the schema if that is needed.
func (v *verifier) inspect(ctx context.Context, epoch uint64) error {
	for _, channel := range []string{"products", v.ownChannel} { // Listen waits for PostgreSQL; a reconnect repeats it
		if err := v.listener.Listen(channel); err != nil && !errors.Is(err, pq.ErrChannelAlreadyOpen) {
			return err
		}
	}
	if !v.schemaApplied {
		if err := v.apply(ctx); err != nil {
			return err
		}
	}
	// While the cache is in use, one notification per second is enough. A listener stops hearing only if it loses its
	// connection, and the service notices that anyway.
	notification := ""
	if time.Since(v.notifiedAt) >= time.Second || !v.trust.trustedIn(epoch) {
		notification, v.notifiedAt = rand.Text(), time.Now()
	}
	var triggers, enabled, void string
	var timeout int64 // in milliseconds
	row := v.heartbeatDB.QueryRowContext(ctx, selectGuards, v.ownChannel, notification)
	err := row.Scan(&triggers, &enabled, &timeout, &void)
	if err != nil {
		return err
	}
	// A role that may not alter the table must accept triggers that are merely on ("O"): they miss only replication.
	if enabled != "AA" && (v.applyError == nil || len(enabled) != 2 || strings.ContainsAny(enabled, "DR")) {
		// Restoring a dump creates the triggers last. Give it a moment before applying the schema.
		v.withoutTriggers++
		v.schemaApplied = v.withoutTriggers < 3
		return errors.New("the triggers are missing or off")
	}
	v.withoutTriggers = 0
	if before := v.triggerIdentity; triggers != before {
		v.triggerIdentity = triggers
		if before != "" {
			return errors.New("the triggers were replaced or switched off")
		}
	}
	if timeout != statementTimeout.Milliseconds() {
		return fmt.Errorf("statement_timeout is %d ms, not %s: a pooler in transaction mode may have lost it",
			timeout, statementTimeout)
	}
	return v.hear(notification)
}

// hear waits for a notification that this process sent to itself. If it is empty, none was sent.
func (v *verifier) hear(notification string) error {
	timeout := time.After(heartbeatTimeout)
	for heard := ""; heard != notification; {
		select {
		case heard = <-v.heard:
		case <-timeout:
			return errors.New("the listener does not hear its own notification: a pooler in transaction mode may drop it")
		}
	}
	return nil
}

// apply applies the schema, because an existing table may lack part of it. It tries at most every applyInterval until
// it succeeds, and meanwhile returns the last error. A role that may not alter the table uses it as it is: that is no
// error.
func (v *verifier) apply(ctx context.Context) error {
	if time.Since(v.appliedAt) > applyInterval {
		v.applyError = v.applySchema(ctx)
		v.appliedAt = time.Now()
	}
	v.schemaApplied = v.applyError == nil || pq.As(v.applyError, pqerror.InsufficientPrivilege) != nil
	if !v.schemaApplied {
		return v.applyError
	}
	return nil
}

// ---------------------------------------------------------------- commands to Redis

// A redisClient sends commands to Redis on one connection. Commands that wait at the same moment travel together, one
// batch at a time. An error ends trust, and so does a different Redis process.
type redisClient struct {
	address, password string
	trust             *trust
	pool              *redis.Pool
	reachable         atomic.Bool // Redis answered the last batch

	mu      sync.Mutex // guards waiting and sending
	waiting []*command // not sent yet
	sending bool       // a caller sends a batch, or is about to

	exchanging sync.Mutex // held during a batch; guards runID
	runID      string     // of the Redis process that answered last

	created   time.Time    // times are measured from here, because time.Since ignores changes of the system clock
	settledAt atomic.Int64 // when that process will have settled, in nanoseconds after created
}

func newRedisClient(address, password string, t *trust) *redisClient {
	c := &redisClient{address: address, password: password, trust: t, created: time.Now()}
	c.reachable.Store(true) // until proven otherwise: even the first writer must announce itself
	// With one connection, a new Redis can answer only on a new connection, and connect notices it.
	c.pool = &redis.Pool{DialContext: c.connect, MaxActive: 1, MaxIdle: 1, Wait: true}
	return c
}

// errUnreachable is the error of a command that was not sent because Redis did not answer the last batch.
var errUnreachable = errors.New("redis did not answer a moment ago")

// A command is one that waits, is on its way to Redis, or has been answered.
type command struct {
	name  string
	args  []any
	reply any
	err   error
	wake  chan bool // receives true if its caller must send the next batch, false if the command is done
}

// do sends a command to Redis and returns the reply. An error ends trust, unless Redis only lacks memory. If Redis did
// not answer the last batch, do fails at once with errUnreachable: that batch has already ended trust.
func (c *redisClient) do(name string, args ...any) (any, error) {
	// With one command per round trip, Redis and this process would spend most of their time in system calls. So
	// waiting commands share a round trip (pipelining). This needs no extra goroutine: one of the callers sends them.
	cmd := &command{name: name, args: args, err: errUnreachable, wake: make(chan bool, 1)}
	c.mu.Lock()
	c.waiting = append(c.waiting, cmd)
	mustSend := !c.sending
	c.sending = true
	c.mu.Unlock()
	if mustSend || <-cmd.wake {
		c.sendWaiting()
	}
	return cmd.reply, cmd.err
}

// sendWaiting sends the waiting commands and wakes their callers. If more commands arrived meanwhile, the caller of the
// first one sends the next batch.
func (c *redisClient) sendWaiting() {
	runtime.Gosched() // callers that have just received a reply may add commands
	c.mu.Lock()
	batch := c.waiting
	c.waiting = nil
	c.mu.Unlock()
	if c.reachable.Load() {
		c.exchange(batch)
	}
	for _, cmd := range batch {
		cmd.wake <- false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sending = len(c.waiting) > 0
	if c.sending {
		c.waiting[0].wake <- true
	}
}

// exchange sends a batch of commands to Redis and receives the replies, within redisTimeout. Each command gets its own
// error, because some may have succeeded before the connection broke. If Redis refuses a command, for example because
// it is only a replica, trust ends too, but Redis stays reachable.
func (c *redisClient) exchange(batch []*command) {
	c.exchanging.Lock()
	defer c.exchanging.Unlock()
	deadline := time.Now().Add(redisTimeout)
	ctx, cancel := context.WithDeadline(context.Background(), deadline)
	defer cancel()
	// A connection that could not be made, or that breaks, returns the reason from every method, including Err.
	conn, err := c.pool.GetContext(ctx)
	defer conn.Close() // returns it to the pool, which drops a broken one
	for _, cmd := range batch {
		_ = conn.Send(cmd.name, cmd.args...)
	}
	_ = conn.Flush()
	for _, cmd := range batch {
		// A timeout of zero would mean no timeout.
		cmd.reply, cmd.err = redis.ReceiveWithTimeout(conn, max(time.Until(deadline), time.Millisecond))
		if !isFull(cmd.err) {
			err = cmp.Or(err, cmd.err)
		}
	}
	c.reachable.Store(conn.Err() == nil)
	if err != nil {
		c.trust.distrust(err)
	}
}

// ping asks Redis whether it answers. It asks even if Redis did not answer the last batch: nothing else does then.
func (c *redisClient) ping() error {
	if c.reachable.Load() {
		_, err := c.do("PING")
		return err
	}
	c.exchange(nil) // only connects, so that the PING has a redisTimeout of its own
	cmd := &command{name: "PING"}
	c.exchange([]*command{cmd})
	return cmd.err
}

// isFull reports whether Redis refused a command for lack of memory. The command then had no effect.
func isFull(err error) bool {
	refusal, ok := errors.AsType[redis.Error](err)
	return ok && strings.HasPrefix(string(refusal), "OOM ")
}

// connect dials Redis and identifies the server before the context's deadline. It refuses a Redis older than 7.0, which
// does not support SET with both NX and GET. It also refuses a Redis that may evict any key, because it could evict a
// writer's mark.
func (c *redisClient) connect(ctx context.Context) (redis.Conn, error) {
	conn, err := redis.DialContext(ctx, "tcp", c.address, redis.DialWriteTimeout(redisTimeout))
	if err != nil {
		return nil, err
	}
	// AUTH and INFO share a round trip, so a slow Redis delays connecting only once. DoContext receives both replies, and
	// returns an error of either.
	if c.password != "" {
		_ = conn.Send("AUTH", c.password)
	}
	info, err := redis.String(redis.DoContext(conn, ctx, "INFO"))
	version, policy := infoField(info, "redis_version"), infoField(info, "maxmemory_policy")
	runID, uptime := infoField(info, "run_id"), infoField(info, "uptime_in_seconds")
	major, _ := strconv.Atoi(strings.Split(version, ".")[0])
	switch {
	case err != nil:
	case major < 7:
		err = fmt.Errorf("redis %s is too old: 7.0 or newer is needed", version)
	case runID == "":
		err = errors.New("redis does not say which process it is (run_id)")
	case strings.HasPrefix(policy, "allkeys"):
		err = fmt.Errorf("redis may evict any key (maxmemory-policy %s): volatile-lru or noeviction is needed", policy)
	}
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	c.identifyServer(runID, uptime)
	return conn, nil
}

// identifyServer notes which Redis process answers and when it will have settled. For the first process it sees, that
// counts from the start of Redis; otherwise from now. A different process ends trust, because it may hold anything,
// such as an old snapshot. A process that was only unresponsive has lost no marks. It settles for noticeTime, until
// every replica has noticed its return and announces writes again.
func (c *redisClient) identifyServer(runID, uptime string) {
	wait := noticeTime
	if c.runID != runID {
		wait = settleTime
		if seconds, err := strconv.Atoi(uptime); c.runID == "" && err == nil {
			wait -= time.Duration(max(0, seconds-1)) * time.Second // Redis may round its uptime up
		}
	} else if c.reachable.Load() {
		return
	}
	// Before distrust: otherwise restore could find the new epoch while settledAt still has its old value, and trust it.
	c.settledAt.Store(max(c.settledAt.Load(), int64(time.Since(c.created)+wait)))
	if c.runID != runID {
		c.runID = runID
		c.trust.distrust(errors.New("another redis, or a restarted one, answers"))
	}
}

// settled reports whether the Redis process that answered last has settled.
func (c *redisClient) settled() bool {
	return time.Since(c.created) >= time.Duration(c.settledAt.Load())
}

// infoField returns a field of a reply to INFO, or "" if it is missing.
func infoField(info, name string) string {
	_, after, _ := strings.Cut("\n"+info, "\n"+name+":")
	value, _, _ := strings.Cut(after, "\r")
	return value
}

// onAllKeys runs UNLINK or EXISTS on all of the cache's keys, and returns how many it counted. It uses SCAN, about
// 5,000 keys at a time, because KEYS would block Redis, which may hold many keys of other programs. After the limit the
// error is context.DeadlineExceeded.
func (c *redisClient) onAllKeys(command string, limit time.Duration) (count int, err error) {
	began := time.Now()
	for cursor := "0"; ; {
		var keys []any
		reply, err := redis.Values(c.do("SCAN", cursor, "MATCH", keyPrefix+"*", "COUNT", 5000))
		if err == nil {
			_, err = redis.Scan(reply, &cursor, &keys)
		}
		if err == nil && len(keys) > 0 {
			var n int
			n, err = redis.Int(c.do(command, keys...))
			count += n
		}
		if err != nil || cursor == "0" {
			return count, err
		}
		if time.Since(began) > limit {
			return count, context.DeadlineExceeded
		}
	}
}

// ---------------------------------------------------------------- for the endpoints

// Clear deletes the cache's keys and returns their number. It gives up after about 5 s, with context.DeadlineExceeded.
// It outlives the request that started it.
func (c *cache) Clear() (int, error) { return c.redis.onAllKeys("UNLINK", 5*time.Second) }

// Version returns the version of the Redis that answers.
func (c *cache) Version() (string, error) {
	info, err := redis.String(c.redis.do("INFO", "server"))
	return infoField(info, "redis_version"), err
}

// Trusted reports whether the cache is in use.
func (c *cache) Trusted() bool { return c.trust.trusted() }

// cacheStats holds the cache's figures in GET /stats.
type cacheStats struct {
	Status   string  `json:"status"`   // connected or disconnected
	Trusted  bool    `json:"trusted"`  // the cache is in use
	Hits     int64   `json:"hits"`     // answered from Redis
	Misses   int64   `json:"misses"`   // answered from PostgreSQL, because Redis held no body
	Bypasses int64   `json:"bypasses"` // answered from PostgreSQL, because the cache was not trusted or Redis failed
	HitRate  float64 `json:"hit_rate"` // the share of hits, from 0 to 1, with three decimals
	Keys     *int    `json:"keys"`     // null if Redis holds too many other keys to count the cache's within a second
	TTL      int     `json:"ttl_seconds"`
	Memory   string  `json:"memory_used"`
}

// Stats returns the counts since this process started, what Redis holds now, and the figures of the connection pool.
func (c *cache) Stats() (cacheStats, redis.PoolStats) {
	st := cacheStats{
		Status: "disconnected", Trusted: c.Trusted(), TTL: int(c.ttl.Seconds()),
		Hits: c.requests[hit].Load(), Misses: c.requests[miss].Load(), Bypasses: c.requests[bypass].Load(),
	}
	all := max(1, st.Hits+st.Misses+st.Bypasses)
	st.HitRate = float64((1000*st.Hits+all/2)/all) / 1000 // rounded
	info, err := redis.String(c.redis.do("INFO", "memory"))
	if err == nil {
		st.Status, st.Memory = "connected", infoField(info, "used_memory_human")
		if count, err := c.redis.onAllKeys("EXISTS", time.Second); err == nil {
			st.Keys = &count
		}
	}
	return st, c.redis.pool.Stats()
}
