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
	"net"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/lib/pq"
)

// A Cache keeps the bodies of responses in Redis, and it never lies: with it, the API gives no answer that it could
// not have given without it.
//
// The pattern is cache-aside: a reader asks Redis first, on a miss it asks PostgreSQL and fills the key; a writer
// changes PostgreSQL and deletes the key. By itself this pattern lies, because the two servers know nothing of each
// other. Four rules make it right. Each is explained where it is in the code:
//
//  1. A reader takes a lease, a writer announces itself; a fill needs the lease, and no writer at work (fillScript).
//  2. The database tells what others changed (hear).
//  3. In doubt, drop everything, and let a new Redis settle (distrust, restore).
//  4. Share only what starts after you (Get).
//
// The first two are ideas of "Scaling Memcache at Facebook" (NSDI 2013). Handlers call Get and Write; Run must run.
type Cache struct {
	cfg      config
	db       *sql.DB
	listener *pq.Listener // receives the notifications of rule 2
	pool     *redis.Pool
	commands chan *command // waiting to be sent to Redis
	sending  chan struct{} // holds something while somebody sends them

	// The cache is trusted while trustedAt equals doubts. Every doubt adds one to doubts, so that a doubt which comes
	// up while trust is being won back is never lost.
	doubts, trustedAt atomic.Uint64
	reachable         atomic.Bool // Redis answered when it was last asked
	listening         atomic.Bool // the first LISTEN was acknowledged; pq.Listener repeats it after a reconnect

	// Only whoever has the one connection to Redis uses these two.
	refusal error  // of a command in its last batch
	runID   string // of the process that it leads to

	settled atomic.Int64 // when that process has settled, in nanoseconds after created
	created time.Time    // when this cache was made; time.Since does not mind when somebody sets the clock

	mu      sync.Mutex         // guards lookups
	lookups map[string]*lookup // by key: the one that waits for its turn or, if none does, the one that runs

	requests map[source]*atomic.Int64 // how many were answered, since this process started
}

// The times of the protocol.
const (
	heartbeat        = 200 * time.Millisecond // how often each server is asked whether it is there
	redisTimeout     = 700 * time.Millisecond // for a round trip to Redis, with the connecting that it may need
	statementTimeout = 2 * time.Second        // PostgreSQL ends a statement after this
	lookupTimeout    = 5 * time.Second        // for whoever waits for a lookup
	leaseLife        = lookupTimeout          // a lease is of no use to a lookup that nobody waits for
	sendTimeout      = 1500 * time.Millisecond
	markLife         = 12 * time.Second
	noticeTime       = redisTimeout + 2*heartbeat
	settleTime       = 5 * time.Second
)

// The times lean on one another. Each line compiles only when what it converts is not negative:
//
// A mark must still be there when its writer's statement commits at the last moment, sendTimeout after the
// announcement and then statementTimeout, and for as long after that as a reader that read the old row may hold its
// lease. A second goes to Redis's clock, which the scripts read in whole seconds.
const _ = uint64(markLife - (sendTimeout + statementTimeout + leaseLife + time.Second))

// A Redis that has just started lacks the marks of the writers that announced themselves to the one before it. It is
// left alone until the last of them must have committed: noticeTime passes until every replica knows of the new
// Redis, and then the time from an announcement to the end of its statement.
const _ = uint64(settleTime - (noticeTime + sendTimeout + statementTimeout))

// A writer that waits for a silent Redis must still be allowed to send its statement afterwards.
const _ = uint64(sendTimeout - 2*redisTimeout)

const (
	keyAll    = "products:all"
	keyPrefix = "products:"
	lease     = "lease:" // how a lease begins; a body begins with a brace
)

// marks names the sorted set of the writers that are at work on a key.
func marks(key string) string { return "writers:" + key }

// A source says where a body came from, as the header Cache-Status does (RFC 9211).
type source string

const (
	hit    source = "redis; hit"
	miss   source = "redis; fwd=miss"
	bypass source = "redis; fwd=bypass" // Redis was not asked, or its answer not used
)

// newCache returns a cache that has not connected to anything yet. The listener has a connection of its own, for which it
// needs dsn.
func newCache(cfg config, db *sql.DB, dsn string) *Cache {
	c := &Cache{
		cfg: cfg, db: db, commands: make(chan *command, 1000), sending: make(chan struct{}, 1), created: time.Now(), lookups: map[string]*lookup{},
		requests: map[source]*atomic.Int64{hit: {}, miss: {}, bypass: {}},
	}
	c.doubts.Store(1)
	c.reachable.Store(true) // until it is found not to be: even the first writer must announce itself
	// One connection: the commands of all requests travel together, and a new connection is the only way to a new Redis.
	// When Redis has refused a command there is a new one, too: somebody may have flushed the scripts, which connect loads.
	c.pool = &redis.Pool{
		DialContext: c.connect, MaxActive: 1, MaxIdle: 1, Wait: true,
		TestOnBorrow: func(redis.Conn, time.Time) error { return c.refusal },
	}
	c.listener = pq.NewDialListener(dialer{2 * time.Second}, dsn, heartbeat, heartbeat, func(event pq.ListenerEventType, err error) {
		if event == pq.ListenerEventDisconnected {
			c.distrust(fmt.Errorf("the listener lost PostgreSQL: %w", err))
			db.SetMaxIdleConns(0) // the idle connections of the pool are most likely lost, too
			db.SetMaxIdleConns(poolSize())
		}
	})
	return c
}

// ---------------------------------------------------------------- reading

// A lookup is one question for one key. The requests that arrived before it began share it.
type lookup struct {
	load  func(context.Context) ([]byte, error)
	begun bool // guarded by the cache's mu

	// The context ends when what follows is there, which finish says, or else after lookupTimeout.
	ctx    context.Context
	finish context.CancelFunc
	body   []byte
	source source
	err    error
}

// Get returns the body for key, from Redis or else from load, which must query PostgreSQL, and where it came from. The
// body is never older than this call, nor than any body that was returned before it. It is shared: do not change it.
// The error is load's or the context's, or context.DeadlineExceeded after lookupTimeout.
//
// Rule 4: share only what starts after you. A thousand requests for one key shall not cost a thousand queries. But
// to join a query that is running already, as the package singleflight does, would be a lie:
//
//	reader A asks PostgreSQL and is given 1.00, and its answer is on its way
//	a writer sets the price to 2.00, and its client is told so
//	that client reads, joins reader A's query, and is told 1.00
//
// So one lookup of a key runs and one waits for its turn. Whoever comes joins the one that waits. A lookup belongs to
// nobody: it goes on when the request that began it has gone away.
func (c *Cache) Get(ctx context.Context, key string, load func(context.Context) ([]byte, error)) ([]byte, source, error) {
	c.mu.Lock()
	mine := c.lookups[key]
	idle := mine == nil
	if idle || mine.begun {
		mine = &lookup{load: load, begun: idle}
		mine.ctx, mine.finish = context.WithTimeout(context.Background(), lookupTimeout)
		c.lookups[key] = mine
	}
	c.mu.Unlock()
	if idle {
		c.look(key, mine) // here and not in a goroutine of its own, which a hit is not worth
	}
	select {
	case <-mine.ctx.Done():
	case <-ctx.Done():
	}
	if mine.ctx.Err() != context.Canceled { // finish cancels it
		return nil, bypass, cmp.Or(ctx.Err(), mine.ctx.Err())
	}
	c.requests[mine.source].Add(1)
	return mine.body, mine.source, mine.err
}

// look does a lookup. Redis is asked first, with one command that returns what the key holds or, when it holds nothing,
// takes the lease on it. What Redis does not know is loaded in a goroutine of its own.
func (c *Cache) look(key string, l *lookup) {
	doubts := c.doubts.Load()
	if c.trustedAt.Load() != doubts {
		go c.load(key, l, bypass, "")
		return
	}
	token := lease + rand.Text()
	reply, err := c.do("SET", key, token, "NX", "GET", "EX", int(leaseLife.Seconds()))
	held, _ := reply.([]byte)
	switch {
	case err != nil || c.doubts.Load() != doubts: // a Redis that came back with an old snapshot may have answered
		go c.load(key, l, bypass, "")
	case held == nil:
		go c.load(key, l, miss, token)
	case bytes.HasPrefix(held, []byte(lease)): // somebody else's, who will fill the key
		go c.load(key, l, miss, "")
	default:
		l.body, l.source = held, hit
		l.finish()
		c.startNext(key, l)
	}
}

// load does the second half of a lookup: it queries PostgreSQL, answers those who wait, and then fills the key if this
// lookup has the lease. They do not wait for the fill, so a Redis that falls silent just now holds up nobody. An error
// is not cached: then the lease is given back.
func (c *Cache) load(key string, l *lookup, from source, token string) {
	l.source = from
	l.body, l.err = l.load(l.ctx)
	if l.err != nil {
		l.body = nil
	}
	l.finish()
	if token != "" { // an error of Redis ends trust, and that is all there is to do about it
		_, _ = c.do("EVALSHA", fillScript.Hash(), 2, key, marks(key), token, l.body, int(c.cfg.cacheTTL.Seconds()))
	}
	c.startNext(key, l)
}

// startNext begins the lookup that waits behind l, if there is one.
func (c *Cache) startNext(key string, l *lookup) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if next := c.lookups[key]; next == l {
		delete(c.lookups, key)
	} else {
		next.begun = true
		go c.look(key, next)
	}
}

// fillScript is the first half of rule 1: a fill needs the lease. Cache-aside without it lies for a whole TTL:
//
//	reader:  finds no body, asks PostgreSQL, and is given the price 1.00
//	writer:  sets the price to 2.00, deletes the key, and answers its client
//	reader:  fills the key with 1.00
//
// Here the reader has left its token in the key. The writer's deletion takes the token away, and the fill finds that
// the key does not hold it any more. A lease expires, so a reader that dies does not keep the key empty for ever.
//
// The second half is that no writer may be at work, since the reader may also have come between the writer's deletion
// and its commit: then it has a new lease, and an old row. An empty body gives the lease back.
var fillScript = redis.NewScript(2, `
	local key, marks, token, body, ttl = KEYS[1], KEYS[2], ARGV[1], ARGV[2], ARGV[3]
	if redis.call('GET', key) ~= token then return end
	redis.call('ZREMRANGEBYSCORE', marks, '-inf', '(' .. redis.call('TIME')[1])
	if body ~= '' and redis.call('EXISTS', marks) == 0 then
		redis.call('SET', key, body, 'EX', ttl)
	else
		redis.call('DEL', key)
	end`)

// ---------------------------------------------------------------- writing

// announceScript is how a writer announces itself before its SQL: it adds its mark to the sorted set of each key, and
// deletes the keys. The deletion comes before the commit so that nobody goes back in time:
//
//	writer:    commits the price 2.00; Redis still holds 1.00
//	reader A:  misses in another replica, and is given 2.00
//	reader B:  comes after A, hits, and is given 1.00
//
// The mark's score is the time at which it expires, on Redis's own clock, for the writer that dies before it removes
// it. A script is a transaction, like MULTI, which can read that clock. The sets have no TTL: a Redis that makes room by
// evicting keys with a TTL must not evict marks.
var announceScript = redis.NewScript(-1, `
	local expires = redis.call('TIME')[1] + ARGV[2]
	for i = 1, #KEYS, 2 do
		redis.call('ZADD', KEYS[i + 1], expires, ARGV[1])
		redis.call('DEL', KEYS[i])
	end`)

// retractScript is how a writer takes its announcement back after its SQL: it removes its own mark, since other writers
// may still be at work, and deletes the keys once more. Without that, a reader which took the lease and read the old
// row before the commit could fill the key now that the mark is gone.
var retractScript = redis.NewScript(-1, `
	for i = 1, #KEYS, 2 do
		redis.call('ZREM', KEYS[i + 1], ARGV[1])
		redis.call('DEL', KEYS[i])
	end`)

// Write runs change, which must change the rows behind keys in one statement on the connection it is given. Once Write
// has returned, or anybody has seen the new rows, no reader gets an old body from the cache. A client that goes away
// does not stop it halfway. The error is change's, or says that PostgreSQL could not be reached, or is errTooLate.
//
// This is the other half of rule 1: a writer announces itself, changes the rows, and retracts. From before the commit
// until after it nothing can be filled, so that every read sees PostgreSQL itself. A writer that dies in between
// leaves empty keys and marks that expire, but never an old body.
//
// Where the announcement fails, the trigger of rule 2 speaks: it does so for every session that does not have the
// service's application_name. Where the retraction fails, the mark keeps readers from filling until it expires.
func (c *Cache) Write(ctx context.Context, keys []string, change func(context.Context, *sql.Conn) error) error {
	// The connection comes first, for a mark must last for the statement and not for the wait before it. It is one
	// connection and not the pool, which would send a statement again when a connection breaks.
	waiting, cancel := context.WithTimeout(ctx, queryTimeout)
	defer cancel()
	conn, err := c.db.Conn(waiting)
	if err != nil {
		return err
	}
	defer conn.Close() // returns it to the pool
	ctx = context.WithValue(context.WithoutCancel(ctx), sendBefore{}, time.Now().Add(sendTimeout))

	token := rand.Text()
	announced := c.mark(announceScript, keys, token) == nil
	if !announced {
		if _, err := conn.ExecContext(ctx, `SET application_name = 'desafio3 without redis'`); err != nil {
			return err
		}
		// If this fails, the connection's next changes are notified although they need not be.
		defer func() { _, _ = conn.ExecContext(ctx, `RESET application_name`) }()
	}
	err = change(ctx, conn)
	if announced && !outcomeUnknown(err) {
		_ = c.mark(retractScript, keys, token)
	}
	return err
}

// mark runs announceScript or retractScript for the keys.
func (c *Cache) mark(script *redis.Script, keys []string, token string) error {
	args := []any{script.Hash(), 2 * len(keys)}
	for _, key := range keys {
		args = append(args, key, marks(key))
	}
	_, err := c.do("EVALSHA", append(args, token, int(markLife.Seconds()))...)
	return err
}

// ---------------------------------------------------------------- commands to Redis

// errUnreachable is the error of a command that was not sent.
var errUnreachable = errors.New("redis did not answer a moment ago")

// A command is on its way to Redis, or has been answered.
type command struct {
	name  string
	args  []any
	reply any
	err   error         // errUnreachable until it is sent
	done  chan struct{} // closed when it was answered
}

// do sends a command to Redis and returns the reply. An error ends trust. Where Redis did not answer a moment ago,
// do fails at once and does not wait for it again.
//
// Commands that wait at the same moment travel together, in one round trip (pipelining). One at a time, Redis and this
// process would spend most of their time in system calls. No goroutine is needed for that: while one caller sends what
// waits, the others wait for their reply or for their turn to send.
func (c *Cache) do(name string, args ...any) (any, error) {
	cmd := &command{name: name, args: args, err: errUnreachable, done: make(chan struct{})}
	c.commands <- cmd
	select {
	case <-cmd.done:
	case c.sending <- struct{}{}:
		c.sendWaiting() // this command, too, unless somebody has just done so
		<-c.sending
	}
	return cmd.reply, cmd.err
}

// sendWaiting sends the commands that wait, and wakes their callers.
func (c *Cache) sendWaiting() {
	runtime.Gosched() // those who have just been answered may come with more
	batch := make([]*command, len(c.commands))
	for i := range batch {
		batch[i] = <-c.commands
	}
	if len(batch) > 0 && c.reachable.Load() {
		c.exchange(batch)
	}
	for _, cmd := range batch {
		close(cmd.done)
	}
}

// exchange sends a batch of commands to Redis and receives the replies, in redisTimeout at most. Each command has an
// error of its own: when the connection breaks, those before it have been answered. That Redis refuses a command,
// because it is full or only a replica, is an error, too, but Redis can still be reached.
func (c *Cache) exchange(batch []*command) {
	deadline := time.Now().Add(redisTimeout)
	ctx, cancel := context.WithDeadline(context.Background(), deadline)
	defer cancel()
	// A connection that could not be made, or that breaks, returns the reason from every call, and from Err.
	conn, _ := c.pool.GetContext(ctx)
	defer conn.Close() // returns it to the pool, which drops it if it is broken
	for _, cmd := range batch {
		_ = conn.Send(cmd.name, cmd.args...)
	}
	_ = conn.Flush()
	var err error
	for _, cmd := range batch {
		// A timeout of zero would be none at all.
		cmd.reply, cmd.err = redis.ReceiveWithTimeout(conn, max(time.Until(deadline), time.Millisecond))
		err = cmp.Or(err, cmd.err)
	}
	c.reachable.Store(conn.Err() == nil)
	if conn.Err() == nil { // or else this is not the one connection any more
		c.refusal = err
	}
	if err != nil {
		c.distrust(err)
	}
}

// connect dials Redis and asks who it is. A Redis older than 7.0 does not know SET with NX and GET, and one that may
// evict any key could forget a writer: both are refused. One that is not the process that answered last may hold
// anything, an old snapshot for example: that ends trust.
func (c *Cache) connect(ctx context.Context) (redis.Conn, error) {
	conn, err := redis.DialContext(ctx, "tcp", net.JoinHostPort(c.cfg.redisHost, c.cfg.redisPort),
		redis.DialPassword(c.cfg.redisPassword), redis.DialReadTimeout(redisTimeout/2), redis.DialWriteTimeout(redisTimeout))
	if err != nil {
		return nil, err
	}
	info, err := redis.String(conn.Do("INFO"))
	version, policy := infoField(info, "redis_version"), infoField(info, "maxmemory_policy")
	major, _ := strconv.Atoi(strings.Split(version, ".")[0])
	if err == nil && major < 7 {
		err = fmt.Errorf("redis %s is too old: 7.0 or newer is needed", version)
	}
	if err == nil && strings.HasPrefix(policy, "allkeys") {
		err = fmt.Errorf("redis may evict any key (maxmemory-policy %s): volatile-lru or noeviction is needed", policy)
	}
	if err = cmp.Or(err, fillScript.Load(conn), announceScript.Load(conn), retractScript.Load(conn)); err != nil {
		_ = conn.Close()
		return nil, err
	}
	c.meet(infoField(info, "run_id"), infoField(info, "uptime_in_seconds"))
	return conn, nil
}

// meet notes which Redis process answers, and when it has settled: counted from its start where it is the first that
// this process knows, and else from now. One that was only silent has lost no marks; it waits until every replica has
// noticed its return and announces its writes to it again.
func (c *Cache) meet(runID, uptime string) {
	wait := noticeTime
	if c.runID != runID {
		wait = settleTime
		if seconds, err := strconv.Atoi(uptime); c.runID == "" && err == nil {
			wait -= time.Duration(max(0, seconds-1)) * time.Second // it may be rounded up
		}
		c.runID = runID
		c.distrust(errors.New("another redis, or a restarted one, answers"))
	} else if c.reachable.Load() {
		return
	}
	c.settled.Store(max(c.settled.Load(), int64(time.Since(c.created)+wait)))
}

// infoField returns a field of a reply to INFO, or nothing.
func infoField(info, name string) string {
	_, after, _ := strings.Cut("\n"+info, "\n"+name+":")
	value, _, _ := strings.Cut(after, "\r")
	return value
}

// ---------------------------------------------------------------- trust

func (c *Cache) trusted() bool { return c.trustedAt.Load() == c.doubts.Load() }

// distrust ends trust. This is rule 3: in doubt, drop everything. After an error of Redis, or when another Redis answers
// than before, or when notifications may have been lost, nobody knows which bodies are old:
//
//	Redis holds the price 1.00, and saves a snapshot to its disk
//	a writer sets the price to 2.00 and deletes the key
//	Redis is killed, starts again, reads its snapshot, and holds 1.00
//
// From now on reads go to PostgreSQL, without trying Redis and waiting for it again, until restore has dropped
// every key. Writes do not depend on trust: they announce themselves wherever Redis answers.
func (c *Cache) distrust(reason error) {
	if doubts := c.doubts.Add(1); c.trustedAt.Load() == doubts-1 {
		slog.Warn("cache not trusted", "reason", reason)
	}
}

// Run hears of the changes of others, and keeps the cache's trust or wins it back, until the context ends.
func (c *Cache) Run(ctx context.Context) {
	go c.hear()
	defer c.listener.Close()
	// The listener is asked in a loop of its own, since its connection counts as lost when nothing comes for 2 s, and
	// it can take longer to drop all keys.
	go repeat(ctx, "not listening", func() (bool, error) {
		err := c.listener.Listen("products") // waits for PostgreSQL
		if err == nil || errors.Is(err, pq.ErrChannelAlreadyOpen) {
			c.listening.Store(true)
			err = c.listener.Ping()
		}
		if err != nil {
			c.distrust(err)
		}
		return false, err
	})
	repeat(ctx, "cache not in use yet", func() (bool, error) {
		// Nobody else asks a Redis that did not answer a moment ago. No other command waits for this one.
		ping := &command{name: "PING"}
		c.exchange([]*command{ping})
		if ping.err != nil || c.trusted() {
			return false, ping.err
		}
		return false, c.restore()
	})
}

// restore wins trust back, or says why it cannot yet. Redis must answer and must have settled, and the listener must
// hear; then all keys are dropped. Whatever raises a doubt meanwhile makes it start over.
//
// Why a new Redis must settle:
//
//	writer:    announces itself, and its statement is on the way to PostgreSQL
//	Redis:     is killed and started again: the mark is gone
//	reader:    trusts the new Redis, takes a lease, reads the old row, and fills: nobody is at work
//	writer:    commits; until it retracts, some readers get the new row, and others hit the old one
//
// After settleTime no writer that announced itself to the Redis before can still commit.
func (c *Cache) restore() error {
	doubts := c.doubts.Load()
	if time.Since(c.created) < time.Duration(c.settled.Load()) {
		return errors.New("redis has only just come up: it has to settle")
	}
	if err := c.listener.Ping(); err != nil || !c.listening.Load() {
		return fmt.Errorf("not listening to PostgreSQL: %v", err)
	}
	// A Redis that is full, or only a replica, refuses this already, and not only the first request.
	if _, err := c.do("SET", keyPrefix+"probe", "", "EX", 1); err != nil {
		return err
	}
	if _, err := c.scan("UNLINK", time.Hour); err != nil { // there may be very many keys of others
		return err
	}
	c.trustedAt.Store(doubts) // no longer the number of doubts, if another came up meanwhile
	if c.trusted() {
		slog.Info("cache trusted")
	}
	return nil
}

// scan runs a command, UNLINK or EXISTS, with the cache's keys, some at a time, and returns how many it counted. SCAN
// does not hold up Redis as KEYS would, however many keys of others it holds. After the limit the error is
// context.DeadlineExceeded.
func (c *Cache) scan(command string, limit time.Duration) (count int, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	for cursor := ""; cursor != "0" && err == nil; err = cmp.Or(err, ctx.Err()) {
		var reply, keys []any
		if reply, err = redis.Values(c.do("SCAN", cmp.Or(cursor, "0"), "MATCH", keyPrefix+"*", "COUNT", 1000)); err == nil {
			_, err = redis.Scan(reply, &cursor, &keys)
		}
		if err == nil && len(keys) > 0 {
			n := 0
			n, err = redis.Int(c.do(command, keys...))
			count += n
		}
	}
	return count, err
}

// hear deletes the keys of the rows that others changed. This is rule 2: the database tells what the API did not do.
// With psql somebody sets the price to 2.00, and nobody would delete the key; but the trigger in schema.sql notifies.
//
// When the ids come faster than their keys can be deleted, one by one is not worth it: that is a doubt, and all keys
// are dropped once it is calm again.
func (c *Cache) hear() {
	for n := range c.listener.Notify {
		switch {
		case n == nil: // the listener has reconnected: the loss of its connection has ended trust already
		case n.Extra == "" || len(c.listener.Notify) == cap(c.listener.Notify) || !c.trusted():
			// Without trust nothing needs to be deleted: all keys will be.
			c.distrust(errors.New("others changed everything, or more than can be deleted key by key"))
		default:
			_, _ = c.do("UNLINK", keyAll, keyPrefix+n.Extra) // an error has ended trust: then all keys will be deleted
		}
	}
}

// ---------------------------------------------------------------- for the endpoints

// Clear deletes every key of the cache and returns how many there were. It takes lookupTimeout at most, and goes on when
// the client has gone away.
func (c *Cache) Clear() (int, error) { return c.scan("UNLINK", lookupTimeout) }

// Version returns the version of the Redis that answers.
func (c *Cache) Version() (string, error) {
	info, err := redis.String(c.do("INFO", "server"))
	return infoField(info, "redis_version"), err
}

// CacheStats are the figures of the cache in GET /stats.
type CacheStats struct {
	Status   string  `json:"status"`   // connected or disconnected
	Trusted  bool    `json:"trusted"`  // the cache is in use
	Hits     int64   `json:"hits"`     // answered from Redis
	Misses   int64   `json:"misses"`   // answered from PostgreSQL, as Redis held no body
	Bypasses int64   `json:"bypasses"` // answered from PostgreSQL, as the cache was not trusted
	HitRate  float64 `json:"hit_rate"` // hits of all, from 0 to 1, with three decimals
	Keys     *int    `json:"keys"`     // null when there are too many keys of others to count ours in a second
	TTL      int     `json:"ttl_seconds"`
	Memory   string  `json:"memory_used"`
}

// Stats counts requests since this process started, and says what Redis holds now.
func (c *Cache) Stats() CacheStats {
	st := CacheStats{
		Status: "disconnected", Trusted: c.trusted(), TTL: int(c.cfg.cacheTTL.Seconds()),
		Hits: c.requests[hit].Load(), Misses: c.requests[miss].Load(), Bypasses: c.requests[bypass].Load(),
	}
	all := max(1, st.Hits+st.Misses+st.Bypasses)
	st.HitRate = float64((1000*st.Hits+all/2)/all) / 1000 // rounded
	info, err := redis.String(c.do("INFO", "memory"))
	if err != nil {
		return st
	}
	st.Status, st.Memory = "connected", infoField(info, "used_memory_human")
	if count, err := c.scan("EXISTS", time.Second); err == nil {
		st.Keys = &count
	}
	return st
}
