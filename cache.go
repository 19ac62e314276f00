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

// A cache keeps the bodies of responses in Redis, and it never lies: with it, the API gives no answer that it could
// not have given without it. Handlers call Get and Write; Run must run.
//
// The pattern is cache-aside: a reader asks Redis first, on a miss it asks PostgreSQL and fills the key; a writer
// changes PostgreSQL and deletes the key. Without more, this pattern returns stale data, because the two servers know
// nothing of each other. Four rules make it right. Each is explained where it is in the code:
//
//  1. A reader takes a lease, a writer announces itself; a fill needs the lease and no writer at work (fillScript).
//  2. The database tells what the API did not do, and the service verifies that it does (verifier).
//  3. In doubt, drop everything, and let a new Redis settle (distrust, restore).
//  4. Share only what starts after you (Get).
//
// The first two are ideas of "Scaling Memcache at Facebook" (NSDI 2013).
type cache struct {
	cacheConfig
	trust   *trust
	redis   *redisClient
	lookups lookups

	requests map[source]*atomic.Int64 // answers since this process started
}

// A cacheConfig is what a cache needs.
type cacheConfig struct {
	db            *sql.DB      // the pool of the requests
	heartbeatDB   *sql.DB      // one connection, made as the pool's are: an exhausted pool is no reason for doubt
	sessions      *atomic.Bool // set here while both are known to be sessions of PostgreSQL's, with no pooler that mixes them
	newListener   func(pq.EventCallbackType) *pq.Listener
	applySchema   func(context.Context) error
	redisAddress  string
	redisPassword string
	ttl           time.Duration
}

// The times of the protocol.
const (
	heartbeat           = 200 * time.Millisecond  // how often each server is checked
	heartbeatTimeout    = time.Second             // for PostgreSQL's answer to a check
	redisTimeout        = 700 * time.Millisecond  // for a round trip to Redis, with the connecting that it may need
	statementTimeout    = 2 * time.Second         // PostgreSQL ends a statement after this
	queryTimeout        = 2500 * time.Millisecond // until the pool has a free connection
	lookupTimeout       = 5 * time.Second         // for a lookup, and for each caller that waits for one
	leaseLife           = lookupTimeout           // a lease is of no use to a lookup that has ended
	sendTimeout         = 1500 * time.Millisecond
	markLife            = 12 * time.Second
	noticeTime          = redisTimeout + 2*heartbeat
	settleTime          = 5 * time.Second
	heartbeatsPerSecond = int(time.Second / heartbeat)
	applyInterval       = 2 * time.Second // between two tries to apply the schema
)

// The times lean on one another. Each line compiles only when what it converts is not negative:
//
// A mark must still be there when its writer's statement commits at the last moment, sendTimeout after the
// announcement and then statementTimeout, and for as long after that as a reader that read the old row may hold its
// lease. A second goes to Redis's clock, which the scripts read in whole seconds.
const _ = uint64(markLife - (sendTimeout + statementTimeout + leaseLife + time.Second))

// A Redis that has just started lacks the marks of the writers that announced themselves to the one before it. It is
// not used until the last of them must have committed: noticeTime passes until every replica knows of the new Redis,
// and then the time from an announcement to the end of its statement.
const _ = uint64(settleTime - (noticeTime + sendTimeout + statementTimeout))

// A writer that waits for an unresponsive Redis must still be allowed to send its statement afterwards.
const _ = uint64(sendTimeout - 2*redisTimeout)

const (
	keyAll      = "products:all"
	keyPrefix   = "products:"
	leasePrefix = "lease:" // a body begins with a brace
)

// writersKey names the sorted set of the writers that are at work on a key.
func writersKey(key string) string { return "writers:" + key }

// A source says where a body came from, as the header Cache-Status does (RFC 9211).
type source string

const (
	hit    source = "redis; hit"
	miss   source = "redis; fwd=miss"
	bypass source = "redis; fwd=bypass" // Redis was not asked, or its answer not used
)

// newCache returns a cache that has not connected to anything yet.
func newCache(cfg cacheConfig) *cache {
	t := &trust{}
	t.epoch.Store(1) // no epoch is trusted yet
	return &cache{
		cacheConfig: cfg,
		trust:       t,
		redis:       newRedisClient(cfg.redisAddress, cfg.redisPassword, t),
		lookups:     lookups{last: map[string]*lookup{}},
		requests:    map[source]*atomic.Int64{hit: {}, miss: {}, bypass: {}},
	}
}

// ---------------------------------------------------------------- reading

// A lookup is one question for one key. The requests that arrived before it started share its result, which is there
// when done is closed.
type lookup struct {
	fillFrom func(context.Context) ([]byte, error)
	started  bool   // guarded by the mutex of lookups
	previous []byte // the body of the lookup before
	done     chan struct{}
	body     []byte
	source   source
	err      error
}

// finish hands the result to the callers. A body that equals the one of the lookup before is that one: callers that
// receive the same bytes then share one copy, however many lookups they came from.
func (l *lookup) finish(body []byte, from source, err error) {
	if bytes.Equal(body, l.previous) {
		body = l.previous
	}
	l.body, l.source, l.err = body, from, err
	close(l.done)
}

// lookups lets requests share lookups. Of each key at most one lookup runs and one waits, and a request joins only a
// lookup that starts after the request arrived.
type lookups struct {
	mu   sync.Mutex
	last map[string]*lookup // by key: the one that waits or, if none does, the one that runs
}

// join returns the lookup to wait for, and whether the caller must start it.
func (ls *lookups) join(key string, fillFrom func(context.Context) ([]byte, error)) (l *lookup, start bool) {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	l = ls.last[key]
	idle := l == nil
	if idle || l.started {
		l = &lookup{fillFrom: fillFrom, started: idle, done: make(chan struct{})}
		ls.last[key] = l
	}
	return l, idle
}

// next ends a lookup's turn and returns the one that waits behind it, or nil.
func (ls *lookups) next(key string, l *lookup) *lookup {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	next := ls.last[key]
	if next == l {
		delete(ls.last, key)
		return nil
	}
	next.started, next.previous = true, l.body
	return next
}

// Get returns the body for key, from Redis or else from fillFrom, which must query PostgreSQL, and where it came from.
// The body is never older than this call, nor than any body that was returned before it. It is shared: do not change
// it. The error is fillFrom's or the context's, or context.DeadlineExceeded after lookupTimeout.
func (c *cache) Get(ctx context.Context, key string, fillFrom func(context.Context) ([]byte, error)) ([]byte, source, error) {
	// Rule 4: share only what starts after you. A thousand requests for one key must not cost a thousand queries. But
	// to join a query that is running already, as the package singleflight does, would return stale data:
	//
	//	reader A asks PostgreSQL and gets 1.00, and its answer is on its way
	//	a writer sets the price to 2.00, and its client gets the confirmation
	//	that client reads, joins reader A's query, and gets 1.00
	//
	// So one lookup of a key runs, one waits for its turn, and new requests join the one that waits. A lookup outlives
	// the request that started it.
	l, start := c.lookups.join(key, fillFrom)
	if start {
		c.lookUp(key, l) // here and not in a goroutine of its own, which a hit is not worth
	}
	select {
	case <-l.done: // a hit needs no timer
	default:
		timeout := time.NewTimer(lookupTimeout)
		defer timeout.Stop()
		select {
		case <-l.done:
		case <-ctx.Done():
			return nil, bypass, ctx.Err()
		case <-timeout.C:
			return nil, bypass, context.DeadlineExceeded
		}
	}
	c.requests[l.source].Add(1)
	return l.body, l.source, l.err
}

// lookUp runs a lookup. It asks Redis first, with one command that returns what the key holds or, when it holds
// nothing, takes the lease on it. What Redis does not have is loaded in a goroutine of its own.
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
	case err != nil || c.trust.epoch.Load() != epoch: // a Redis that came back with an old snapshot may have answered
		go c.fillFromDatabase(key, l, bypass, "")
	case held == nil:
		go c.fillFromDatabase(key, l, miss, token)
	case bytes.HasPrefix(held, []byte(leasePrefix)): // another reader's, which will fill the key
		go c.fillFromDatabase(key, l, miss, "")
	default:
		l.finish(held, hit, nil)
		c.startNext(key, l)
	}
}

// fillFromDatabase is the second half of a lookup: it queries PostgreSQL, answers the callers, and then fills the key
// if this lookup has the lease. An error is not cached: then it gives the lease back.
func (c *cache) fillFromDatabase(key string, l *lookup, from source, token string) {
	ctx, cancel := context.WithTimeout(context.Background(), lookupTimeout)
	defer cancel()
	body, err := recovered(ctx, l.fillFrom)
	l.finish(body, from, err) // before the fill: an unresponsive Redis holds up nobody
	if token != "" {          // an error of Redis ends trust, and that is all there is to do about it
		_, _ = c.redis.do("EVAL", fillScript, 2, key, writersKey(key), token, l.body, int(c.ttl.Seconds()))
	}
	c.startNext(key, l)
}

// recovered calls f and turns a panic into an error, as net/http does for a handler: it must not end the process.
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

// startNext starts the lookup that waits behind l, if there is one.
func (c *cache) startNext(key string, l *lookup) {
	if next := c.lookups.next(key, l); next != nil {
		go c.lookUp(key, next)
	}
}

// fillScript is the first half of rule 1: a fill needs the lease. Cache-aside without it is stale for a whole TTL:
//
//	reader:  finds no body, asks PostgreSQL, and gets the price 1.00
//	writer:  sets the price to 2.00, deletes the key, and answers its client
//	reader:  fills the key with 1.00
//
// Here the reader has left its token in the key. The writer's deletion takes the token with it, and the fill finds
// another value. A lease expires, so a reader that dies does not keep the key empty for ever.
//
// The second half is that no writer may be at work, since the reader may also have come between the writer's deletion
// and its commit: then it has a new lease, and an old row. An empty body gives the lease back, and so does one for
// which Redis has no memory: that is no error.
const fillScript = `
	local key, writers, token, body, ttl = KEYS[1], KEYS[2], ARGV[1], ARGV[2], ARGV[3]
	if redis.call('GET', key) ~= token then return end
	redis.call('ZREMRANGEBYSCORE', writers, '-inf', '(' .. redis.call('TIME')[1])
	if body == '' or redis.call('EXISTS', writers) == 1 or redis.pcall('SET', key, body, 'EX', ttl).err then
		redis.call('DEL', key)
	end`

// ---------------------------------------------------------------- writing

// announceScript is how a writer announces itself before its SQL: it adds its mark to the sorted set of each key, and
// deletes the keys. The deletion comes before the commit so that nobody goes back in time:
//
//	writer:    commits the price 2.00; Redis still holds 1.00
//	reader A:  misses in another replica, and gets 2.00
//	reader B:  comes after A, hits, and gets 1.00
//
// The mark's score is the time at which it expires, on Redis's own clock, for the writer that dies before it removes
// it. A script is a transaction, like MULTI, which can read that clock. The sets have no TTL: a Redis that makes room by
// evicting keys with a TTL must not evict marks.
const announceScript = `
	local expires = redis.call('TIME')[1] + ARGV[2]
	for i = 1, #KEYS, 2 do
		redis.call('ZADD', KEYS[i + 1], expires, ARGV[1])
		redis.call('DEL', KEYS[i])
	end`

// retractScript is how a writer takes its announcement back after its SQL: it removes its own mark, since other writers
// may still be at work, and deletes the keys once more. Without that, a reader which took the lease and read the old
// row before the commit could fill the key now that the mark is gone.
const retractScript = `
	for i = 1, #KEYS, 2 do
		redis.call('ZREM', KEYS[i + 1], ARGV[1])
		redis.call('DEL', KEYS[i])
	end`

// The errors of changes. A change's error wraps errUnchanged where certainly nothing was changed, and errRepeat where
// that is so and it would succeed at once. Write's error wraps errOutcomeUnknown where neither is known.
var (
	errUnchanged      = errors.New("nothing was changed")
	errRepeat         = fmt.Errorf("repeat it: %w", errUnchanged)
	errOutcomeUnknown = errors.New("outcome unknown")
	errTooLate        = errors.New("too late to send the statement")
)

// Write runs change, which must send one statement, to change the rows behind keys. Once Write has returned, or any
// client has seen the new rows, no reader gets an old body from the cache. A client that leaves does not stop it
// halfway. The error is change's, or that of connecting, or errTooLate.
func (c *cache) Write(ctx context.Context, keys []string, change func(context.Context, *sql.Conn) error) error {
	for token := rand.Text(); ; {
		announced, err := c.announceAndChange(ctx, keys, token, change)
		// Where the announcement failed, the trigger has spoken. Where the outcome is unknown, the statement may yet commit:
		// its marks stay until they expire. Where the retraction fails, too, the marks keep readers from filling.
		if announced && !errors.Is(err, errOutcomeUnknown) {
			_ = c.runWriterScript(retractScript, keys, token)
		}
		if !errors.Is(err, errRepeat) { // with it, the pool has dropped a connection, so this ends
			return err
		}
	}
}

// announceAndChange is the other half of rule 1: a writer announces itself, changes the rows, and retracts. From before
// the commit until after it nothing can be filled, so that every read sees PostgreSQL itself. A writer that dies in
// between leaves empty keys and marks that expire, but never an old body.
func (c *cache) announceAndChange(ctx context.Context, keys []string, token string,
	change func(context.Context, *sql.Conn) error) (announced bool, err error) {
	// The connection comes first, for a mark must last for the statement and not for the wait before it. It is one
	// connection and not the pool, which would send a statement again when a connection breaks. It goes back to the pool
	// before the retraction, which does not need it.
	waiting, cancel := context.WithTimeout(ctx, queryTimeout)
	defer cancel()
	conn, err := c.db.Conn(waiting)
	if err != nil {
		return false, err
	}
	defer conn.Close()
	ctx = context.WithoutCancel(ctx)
	deadline := time.Now().Add(sendTimeout)
	announced = c.runWriterScript(announceScript, keys, token) == nil
	if !announced {
		c.trust.distrust(errors.New("a writer could not announce itself")) // what is cached may be old in a moment
		// The trigger of rule 2 speaks for every session that does not have the service's application_name.
		if _, err := conn.ExecContext(ctx, `SET application_name = 'desafio3 without redis'`); err != nil {
			return false, err
		}
		// If this fails, the connection's next changes are notified although they need not be.
		defer func() { _, _ = conn.ExecContext(ctx, `RESET application_name`) }()
	}
	// After a pause here, the mark might expire before the commit.
	if time.Now().After(deadline) {
		return announced, errTooLate
	}
	err = change(ctx, conn)
	if err != nil && !errors.Is(err, errUnchanged) {
		err = fmt.Errorf("%w: %w", errOutcomeUnknown, err)
	}
	return announced, err
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

// A trust decides whether the cache may be used: only in an epoch in which PostgreSQL was found to be as rule 2 needs it,
// and in which all keys were dropped. Every doubt begins a new epoch, so a doubt that comes up while trust is being won
// back is never lost.
type trust struct{ epoch, verifiedEpoch, trustedEpoch atomic.Uint64 }

func (t *trust) trustedIn(epoch uint64) bool { return t.trustedEpoch.Load() == epoch }
func (t *trust) trusted() bool               { return t.trustedIn(t.epoch.Load()) }

// distrust ends trust. From now on reads go to PostgreSQL, without trying Redis and waiting for it again, until restore
// has dropped every key. Writes do not depend on trust: they announce themselves wherever Redis answers.
func (t *trust) distrust(reason error) {
	// Rule 3: in doubt, drop everything. After an error of Redis, or when another Redis answers than before, or when
	// notifications may have been lost, nobody knows which bodies are old:
	//
	//	Redis holds the price 1.00, and saves a snapshot to its disk
	//	a writer sets the price to 2.00 and deletes the key
	//	Redis is killed, starts again, reads its snapshot, and holds 1.00
	if epoch := t.epoch.Add(1); t.trustedIn(epoch - 1) {
		slog.Warn("cache not trusted", "reason", reason)
	}
}

// Run keeps the cache's trust or wins it back, and handles what other sessions change, until the context ends.
func (c *cache) Run(ctx context.Context) {
	v := &verifier{cache: c, heard: make(chan string, 10), ownChannel: "heartbeat_" + rand.Text()}
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

// repeat calls f at every heartbeat until the context ends, and logs an error that is not the one before it.
func repeat(ctx context.Context, what string, f func() error) {
	ticker := time.NewTicker(heartbeat)
	defer ticker.Stop()
	for last := ""; ctx.Err() == nil; {
		err := f()
		if reason := fmt.Sprint(err); err == nil {
			last = ""
		} else if reason != last && ctx.Err() == nil {
			slog.Warn(what, "reason", reason)
			last = reason
		}
		select {
		case <-ctx.Done():
		case <-ticker.C:
		}
	}
}

// restore wins trust back, or says why it cannot yet: Redis must answer and must have settled, and PostgreSQL must have
// been verified since the last doubt; then all keys are dropped. A doubt that comes up meanwhile makes it start over.
func (c *cache) restore() error {
	epoch := c.trust.epoch.Load()
	// Why a new Redis must settle:
	//
	//	writer:    announces itself, and its statement is on the way to PostgreSQL
	//	Redis:     is killed and started again: the mark is gone
	//	reader:    trusts the new Redis, takes a lease, reads the old row, and fills: no writer is at work
	//	writer:    commits; until it retracts, some readers get the new row, and others hit the old one
	//
	// After settleTime no writer that announced itself to the Redis before can still commit.
	if !c.redis.settled() {
		return errors.New("redis has only just started: it has to settle")
	}
	if c.trust.verifiedEpoch.Load() != epoch {
		return errors.New("PostgreSQL is not verified yet")
	}
	// A Redis that is full, or only a replica, refuses this already, and not only the first request.
	if _, err := c.redis.do("SET", keyPrefix+"probe", "", "EX", 1); err != nil {
		return err
	}
	if _, err := c.redis.scan("UNLINK", time.Hour); err != nil { // Redis may hold very many keys of other programs
		return err
	}
	c.trust.trustedEpoch.Store(epoch) // not the current one if a doubt came up meanwhile
	if c.trust.trusted() {
		slog.Info("cache trusted")
	}
	return nil
}

// A verifier receives what PostgreSQL tells, and checks that it tells all. Whatever is not as rule 2 needs it ends trust:
// a dump that was restored, a trigger that was off for a moment, a pooler that drops statement_timeout or keeps
// notifications from the listener.
type verifier struct {
	*cache
	listener   *pq.Listener
	heard      chan string // the service's own notifications
	ownChannel string      // on which they are sent

	schemaIsThere bool      // the schema was applied, and the triggers were not missed since
	appliedAt     time.Time // when that was last tried
	applyError    error     // how it ended
	triggers      string    // their identity when they were last seen
	missing       int       // heartbeats in a row without them
	beats         int       // heartbeats
}

// handleNotifications deletes the keys of the rows that other sessions changed. This is rule 2: the database tells what
// the API did not do. Somebody sets the price to 2.00 with psql, and the trigger in schema.sql notifies.
func (v *verifier) handleNotifications() {
	queue := v.listener.Notify
	for n := range queue {
		switch {
		case n == nil: // the listener has reconnected: the loss of its connection has ended trust already
		case n.Channel == v.ownChannel:
			select {
			case v.heard <- n.Extra:
			default: // nobody waits for it any more
			}
		case n.Extra == "" || len(queue) == cap(queue) || len(queue) > 0 && !v.trust.trusted():
			// When ids come faster than their keys can be deleted, one by one is not worth it: all keys are dropped once
			// it is calm again. Steady changes do not keep trust from being won.
			v.trust.distrust(errors.New("other sessions changed everything, or more than can be deleted key by key"))
		default:
			_, _ = v.redis.do("UNLINK", keyAll, keyPrefix+n.Extra) // an error has ended trust
		}
	}
}

// selectGuards reads what rule 2 rests on: which triggers tell of changes and whether they speak in every session, in
// the order of their names, and the time limit of statements. Neither a lock on the table nor its loss disturbs it.
// oid and xmin identify a trigger and its function: they change when it is made again, or switched off and on.
const selectGuards = `
SELECT coalesce(string_agg(concat_ws('.', t.oid, t.xmin, f.oid, f.xmin), ' ' ORDER BY t.tgname), ''),
       coalesce(string_agg(t.tgenabled::text, '' ORDER BY t.tgname), ''),
       (1000 * extract(epoch FROM current_setting('statement_timeout')::interval))::bigint,
       coalesce(CASE WHEN $2 <> '' THEN pg_notify($1, $2) END::text, '')
FROM pg_trigger AS t
JOIN pg_proc AS f ON f.oid = t.tgfoid
WHERE t.tgrelid = to_regclass('products') AND t.tgname IN ('products_changed', 'products_truncated')`

// verify checks PostgreSQL at a heartbeat. An error has ended trust.
func (v *verifier) verify(ctx context.Context) error {
	epoch := v.trust.epoch.Load()
	err := v.inspect(ctx, epoch)
	switch {
	case err == nil:
		v.trust.verifiedEpoch.Store(epoch)
	case ctx.Err() == nil:
		v.trust.distrust(err)
	}
	v.sessions.Store(err == nil)
	return err
}

// inspect returns an error that says what is not as rule 2 needs it.
func (v *verifier) inspect(ctx context.Context, epoch uint64) error {
	for _, channel := range []string{"products", v.ownChannel} { // waits for PostgreSQL; repeated after a reconnect
		if err := v.listener.Listen(channel); err != nil && !errors.Is(err, pq.ErrChannelAlreadyOpen) {
			return err
		}
	}
	if !v.schemaIsThere {
		if err := v.apply(ctx); err != nil {
			return err
		}
	}
	// While the cache is in use, a notification per second is enough: a listener does not turn deaf without losing its
	// connection, which is noticed anyway.
	v.beats++
	own := ""
	if v.beats%heartbeatsPerSecond == 0 || !v.trust.trustedIn(epoch) {
		own = strconv.Itoa(v.beats)
	}
	var triggers, enabled, void string
	var timeout int64 // in milliseconds
	err := v.heartbeatDB.QueryRowContext(ctx, selectGuards, v.ownChannel, own).Scan(&triggers, &enabled, &timeout, &void)
	if err != nil {
		return err
	}
	// A role that may not alter the table has to take triggers that are only on ("O"): they speak for all but replication.
	if enabled != "AA" && (v.applyError == nil || len(enabled) != 2 || strings.ContainsAny(enabled, "DR")) {
		// A dump that is being restored makes the triggers last. It needs a moment without interference.
		v.missing++
		v.schemaIsThere = v.missing < 3
		return errors.New("the triggers are missing or off")
	}
	v.missing = 0
	if before := v.triggers; triggers != before {
		v.triggers = triggers
		if before != "" {
			return errors.New("the triggers were replaced or switched off")
		}
	}
	if timeout != statementTimeout.Milliseconds() {
		return fmt.Errorf("statement_timeout is %d ms, not %s: a pooler in transaction mode does not keep it", timeout, statementTimeout)
	}
	for deaf := time.After(heartbeatTimeout); own != ""; {
		select {
		case heard := <-v.heard:
			if heard == own {
				return nil
			}
		case <-deaf:
			return errors.New("the listener does not hear its own notification: a pooler in transaction mode does not pass it on")
		}
	}
	return nil
}

// apply applies the schema, every two seconds until that has succeeded: a table from before may lack some of it. A role
// that may not alter the table uses it as it is.
func (v *verifier) apply(ctx context.Context) error {
	if time.Since(v.appliedAt) > applyInterval {
		v.applyError = v.applySchema(ctx)
		v.appliedAt = time.Now()
	}
	v.schemaIsThere = v.applyError == nil || pq.As(v.applyError, pqerror.InsufficientPrivilege) != nil
	if v.schemaIsThere {
		return nil
	}
	return v.applyError
}

// ---------------------------------------------------------------- commands to Redis

// A redisClient sends commands to Redis on one connection. Commands that wait at the same moment travel together, one
// batch at a time. An error, and another Redis than before, end trust.
type redisClient struct {
	address, password string
	trust             *trust
	pool              *redis.Pool
	reachable         atomic.Bool // Redis answered when it was last asked

	mu      sync.Mutex // guards what follows
	waiting []*command // to be sent
	sending bool       // a caller sends a batch, or is about to

	exchanging sync.Mutex // held for a batch; guards runID
	runID      string     // of the Redis process that answered last

	created  time.Time    // time.Since does not mind when somebody sets the clock
	settling atomic.Int64 // until when that process has to settle, in nanoseconds after created
}

func newRedisClient(address, password string, t *trust) *redisClient {
	c := &redisClient{address: address, password: password, trust: t, created: time.Now()}
	c.reachable.Store(true) // until it is found not to be: even the first writer must announce itself
	// One connection, so that a new connection is the only way to a new Redis: connect then notices.
	c.pool = &redis.Pool{DialContext: c.connect, MaxActive: 1, MaxIdle: 1, Wait: true}
	return c
}

// errUnreachable is the error of a command that was not sent.
var errUnreachable = errors.New("redis did not answer a moment ago")

// A command is on its way to Redis, or has been answered.
type command struct {
	name  string
	args  []any
	reply any
	err   error
	wake  chan bool // receives whether its caller must send the next batch; if not, it was answered
}

// do sends a command to Redis and returns the reply. An error ends trust. Where Redis did not answer a moment ago,
// do fails at once and does not wait for it again.
func (c *redisClient) do(name string, args ...any) (any, error) {
	// One at a time, Redis and this process would spend most of their time in system calls. So commands that wait travel
	// together, in one round trip (pipelining). No goroutine is needed for that: one of their callers sends them all.
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

// sendWaiting sends the commands that wait, wakes their callers, and has one of those that came meanwhile go on.
func (c *redisClient) sendWaiting() {
	runtime.Gosched() // those who have just been answered may come with more
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

// exchange sends a batch of commands to Redis and receives the replies, in redisTimeout at most. Each command has an
// error of its own: when the connection breaks, those before it have been answered. That Redis refuses a command,
// because it is only a replica for example, is an error, too, but Redis can still be reached.
func (c *redisClient) exchange(batch []*command) {
	c.exchanging.Lock()
	defer c.exchanging.Unlock()
	deadline := time.Now().Add(redisTimeout)
	ctx, cancel := context.WithDeadline(context.Background(), deadline)
	defer cancel()
	// A connection that could not be made, or that breaks, returns the reason from every call, and from Err.
	conn, err := c.pool.GetContext(ctx)
	defer conn.Close() // returns it to the pool, which drops it if it is broken
	for _, cmd := range batch {
		_ = conn.Send(cmd.name, cmd.args...)
	}
	_ = conn.Flush()
	for _, cmd := range batch {
		// A timeout of zero would be none at all.
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

// ping asks Redis whether it answers, also where it did not a moment ago: nothing else asks then.
func (c *redisClient) ping() error {
	if c.reachable.Load() {
		_, err := c.do("PING")
		return err
	}
	c.exchange(nil) // to connect and to ask have their time each
	cmd := &command{name: "PING"}
	c.exchange([]*command{cmd})
	return cmd.err
}

// isFull reports whether Redis refused a command because it has no memory left. Nothing was done then.
func isFull(err error) bool {
	refusal, ok := errors.AsType[redis.Error](err)
	return ok && strings.HasPrefix(string(refusal), "OOM ")
}

// connect dials Redis and asks who it is, in the time that the context leaves. A Redis older than 7.0 does not know SET
// with NX and GET, and one that may evict any key could forget a writer: both are refused.
func (c *redisClient) connect(ctx context.Context) (redis.Conn, error) {
	conn, err := redis.DialContext(ctx, "tcp", c.address, redis.DialWriteTimeout(redisTimeout))
	if err != nil {
		return nil, err
	}
	// Both at once: a Redis that takes long for an answer takes it once.
	if c.password != "" {
		_ = conn.Send("AUTH", c.password)
	}
	_ = conn.Send("INFO")
	_ = conn.Flush()
	if c.password != "" {
		_, err = redis.ReceiveContext(conn, ctx)
	}
	var info string
	if err == nil {
		info, err = redis.String(redis.ReceiveContext(conn, ctx))
	}
	version, policy := infoField(info, "redis_version"), infoField(info, "maxmemory_policy")
	major, _ := strconv.Atoi(strings.Split(version, ".")[0])
	switch {
	case err != nil:
	case major < 7:
		err = fmt.Errorf("redis %s is too old: 7.0 or newer is needed", version)
	case strings.HasPrefix(policy, "allkeys"):
		err = fmt.Errorf("redis may evict any key (maxmemory-policy %s): volatile-lru or noeviction is needed", policy)
	}
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	c.identifyServer(infoField(info, "run_id"), infoField(info, "uptime_in_seconds"))
	return conn, nil
}

// identifyServer notes which Redis process answers, and when it has settled: counted from its start where it is the
// first that this process knows, and else from now. Another process than before may hold anything, an old snapshot for
// example, so it ends trust. One that was only unresponsive has lost no marks: it waits until every replica has noticed
// its return and announces its writes to it again.
func (c *redisClient) identifyServer(runID, uptime string) {
	wait := noticeTime
	if c.runID != runID {
		wait = settleTime
		if seconds, err := strconv.Atoi(uptime); c.runID == "" && err == nil {
			wait -= time.Duration(max(0, seconds-1)) * time.Second // it may be rounded up
		}
	} else if c.reachable.Load() {
		return
	}
	// Before the doubt: in between, restore would find the new epoch, and a Redis that has settled.
	c.settling.Store(max(c.settling.Load(), int64(time.Since(c.created)+wait)))
	if c.runID != runID {
		c.runID = runID
		c.trust.distrust(errors.New("another redis, or a restarted one, answers"))
	}
}

// settled reports whether the Redis that answered last has settled.
func (c *redisClient) settled() bool {
	return time.Since(c.created) >= time.Duration(c.settling.Load())
}

// infoField returns a field of a reply to INFO, or nothing.
func infoField(info, name string) string {
	_, after, _ := strings.Cut("\n"+info, "\n"+name+":")
	value, _, _ := strings.Cut(after, "\r")
	return value
}

// scan runs a command, UNLINK or EXISTS, with the cache's keys, a thousand at a time, and returns how many it counted.
// SCAN does not hold up Redis as KEYS would, however many keys of other programs it holds. After the limit the error is
// context.DeadlineExceeded.
func (c *redisClient) scan(name string, limit time.Duration) (count int, err error) {
	began := time.Now()
	for cursor := "0"; ; {
		var keys []any
		reply, err := redis.Values(c.do("SCAN", cursor, "MATCH", keyPrefix+"*", "COUNT", 1000))
		if err == nil {
			_, err = redis.Scan(reply, &cursor, &keys)
		}
		if err == nil && len(keys) > 0 {
			var n int
			n, err = redis.Int(c.do(name, keys...))
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

// Clear deletes every key of the cache and returns how many there were. It takes lookupTimeout at most, and outlives
// the request that started it.
func (c *cache) Clear() (int, error) { return c.redis.scan("UNLINK", lookupTimeout) }

// Version returns the version of the Redis that answers.
func (c *cache) Version() (string, error) {
	info, err := redis.String(c.redis.do("INFO", "server"))
	return infoField(info, "redis_version"), err
}

// Trusted reports whether the cache is in use.
func (c *cache) Trusted() bool { return c.trust.trusted() }

// cacheStats are the figures of the cache in GET /stats.
type cacheStats struct {
	Status   string  `json:"status"`   // connected or disconnected
	Trusted  bool    `json:"trusted"`  // the cache is in use
	Hits     int64   `json:"hits"`     // answered from Redis
	Misses   int64   `json:"misses"`   // answered from PostgreSQL, as Redis held no body
	Bypasses int64   `json:"bypasses"` // answered from PostgreSQL, as the cache was not trusted
	HitRate  float64 `json:"hit_rate"` // hits of all, from 0 to 1, with three decimals
	Keys     *int    `json:"keys"`     // null when Redis holds too many keys of other programs to count ours in a second
	TTL      int     `json:"ttl_seconds"`
	Memory   string  `json:"memory_used"`
}

// Stats returns what was counted since this process started, and what Redis holds now.
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
		if count, err := c.redis.scan("EXISTS", time.Second); err == nil {
			st.Keys = &count
		}
	}
	return st, c.redis.pool.Stats()
}
