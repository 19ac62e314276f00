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
	"maps"
	"net"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/lib/pq"
)

// The times of the protocol. They lean on one another: a mark must outlive the slowest change it announces (the
// answer of Redis, then the statement) and every lookup that began before that change was committed, so that
// whoever dies leaves nothing behind that a late reader could fill with an old row.
const (
	redisTimeout     = 700 * time.Millisecond     // for one command
	redisDialTimeout = 500 * time.Millisecond     // for a new connection, and again for the questions asked on it
	statementTimeout = 5 * time.Second            // PostgreSQL ends a statement after this
	leaseLife        = requestTimeout             // a reader's lease lasts as long as its lookup may
	markLife         = 12 * time.Second           // > 2*redisTimeout + statementTimeout + leaseLife
	heartbeat        = 200 * time.Millisecond     // how often trust is checked, or won back
	redisGrace       = redisTimeout + 3*heartbeat // for every replica to notice a Redis that came back
)

const (
	keyAll     = "products:all"
	keyPrefix  = "products:"
	lease      = "lease:" // begins a value that is not a body: bodies are JSON objects
	maxSenders = 2        // so that a long list on one connection does not hold up all
)

// A source says where a body came from, as a Cache-Status header does (RFC 9211).
type source string

const (
	hit    source = "redis; hit"
	miss   source = "redis; fwd=miss"
	bypass source = "redis; fwd=bypass"
)

// A Cache keeps response bodies in Redis so that no reader can tell: the API with it is as linearizable as
// PostgreSQL without it. It follows "Scaling Memcache at Facebook" (NSDI 2013): leases for readers, invalidation
// by the database; the README gives its four rules. Get reads, Write writes, Run must run.
type Cache struct {
	db       *sql.DB
	listener *pq.Listener                              // hears of changes made by other sessions
	pool     *redis.Pool                               // serves while the cache is trusted
	dial     func(context.Context) (redis.Conn, error) // never with a client's, whose end would be taken for Redis's
	ttl      time.Duration

	// The cache is trusted while trustedAt equals doubts. To doubt is to count up, so a doubt that comes
	// while trust is being won back is never lost.
	doubts, trustedAt atomic.Uint64
	doubtedAt         atomic.Int64 // Unix nanoseconds; an older connection is not used again
	reachable         atomic.Bool  // Redis answered when last asked; if not, a writer does not wait for it again
	listening         atomic.Bool  // the first LISTEN was acknowledged; the listener repeats it by itself

	mu         sync.Mutex         // guards what follows
	lookups    map[string]*lookup // by key: the one that runs
	queue      []*command         // waiting to be sent
	senders    int                // goroutines at it
	writes     map[string]*write  // by token: announced, not yet known to be retracted
	runID      string             // of the Redis last connected to
	redisSince time.Time          // that Redis was there already

	// The list last read. As long as it stays the same, all the clients that are being sent it share this copy.
	list []byte

	hits, misses, bypasses atomic.Int64 // requests
}

// A lookup is one question for one key, shared by the requests that arrived before it began.
type lookup struct {
	load   func(context.Context) ([]byte, error)
	next   *lookup // the one that waits its turn, which all who arrive now may join
	done   chan struct{}
	body   []byte
	source source
	err    error
}

// A command is to be sent to Redis, or has been answered.
type command struct {
	name  string
	args  []any
	reply any
	err   error
	done  chan struct{}
}

// A write is the announcement of a change to keys; sent means that its mark may be in Redis, over that the
// change has been made or refused.
type write struct {
	token      string
	keys       []string
	sent, over bool
}

// newCache connects to nothing yet. The DSN is for the listener's own connection to the database of db.
func newCache(cfg config, db *sql.DB, dsn string) *Cache {
	c := &Cache{
		db: db, ttl: cfg.cacheTTL,
		lookups: map[string]*lookup{}, writes: map[string]*write{},
	}
	c.doubts.Store(1)
	c.reachable.Store(true) // until it is found not to be: the first write, too, must announce itself
	c.dial = func(ctx context.Context) (redis.Conn, error) {
		conn, err := c.connect(ctx, net.JoinHostPort(cfg.redisHost, cfg.redisPort), cfg.redisPassword)
		c.reachable.Store(err == nil)
		return conn, err
	}
	c.pool = &redis.Pool{
		DialContext: c.dial, MaxActive: poolSize(), MaxIdle: poolSize(), Wait: true, IdleTimeout: 5 * time.Minute,
		TestOnBorrow: func(_ redis.Conn, used time.Time) error {
			if used.UnixNano() <= c.doubtedAt.Load() {
				return errors.New("a connection from before the last doubt")
			}
			return nil
		},
	}
	c.listener = pq.NewDialListener(dialer{2 * time.Second}, dsn, heartbeat, heartbeat, func(event pq.ListenerEventType, err error) {
		if event == pq.ListenerEventDisconnected {
			c.distrust(fmt.Errorf("the listener lost PostgreSQL: %w", err))
			db.SetMaxIdleConns(0) // the pool's idle connections went with it, most likely
			db.SetMaxIdleConns(poolSize())
		}
	})
	return c
}

// Get returns the body for key, from Redis or else from load, which must query PostgreSQL, and where it came from.
// The body is never older than the call, nor than any body returned before the call; it is shared and must not be
// changed. Requests share lookups, but never one that began before they arrived, since that may have read a row
// that was replaced before: one lookup of a key runs, one waits, and whoever comes joins the one that waits. The
// error is load's, the context's, or context.DeadlineExceeded after requestTimeout.
func (c *Cache) Get(ctx context.Context, key string, load func(context.Context) ([]byte, error)) ([]byte, source, error) {
	c.mu.Lock()
	mine := &lookup{load: load, done: make(chan struct{})}
	switch running := c.lookups[key]; {
	case running == nil:
		c.lookups[key] = mine
		go c.run(key, mine)
	case running.next == nil:
		running.next = mine
	default:
		mine = running.next
	}
	c.mu.Unlock()
	select {
	case <-ctx.Done():
		return nil, "", ctx.Err()
	case <-time.After(requestTimeout):
		return nil, "", context.DeadlineExceeded
	case <-mine.done:
	}
	switch mine.source {
	case hit:
		c.hits.Add(1)
	case miss:
		c.misses.Add(1)
	case bypass:
		c.bypasses.Add(1)
	}
	return mine.body, mine.source, mine.err
}

// run does the lookups of key one after the other until nobody waits. They outlive the requests that began them.
func (c *Cache) run(key string, l *lookup) {
	for l != nil {
		l.body, l.source, l.err = c.look(key, func() ([]byte, error) { return within(context.Background(), l.load) })
		if key == keyAll { // alone here: one lookup of a key runs
			if bytes.Equal(l.body, c.list) {
				l.body = c.list
			}
			c.list = l.body
		}
		close(l.done)
		c.mu.Lock()
		if c.lookups[key] = l.next; l.next == nil {
			delete(c.lookups, key)
		}
		l = l.next
		c.mu.Unlock()
	}
}

// look asks Redis for the body of key and takes the lease on it where there is none, in one command. Only with its
// own lease may it fill the key with what it loads.
func (c *Cache) look(key string, load func() ([]byte, error)) ([]byte, source, error) {
	doubts := c.doubts.Load()
	if c.trustedAt.Load() != doubts {
		body, err := load()
		return body, bypass, err
	}
	token := lease + rand.Text()
	held, err := c.do("SET", key, token, "NX", "GET", "EX", int(leaseLife.Seconds()))
	if err != nil || c.doubts.Load() != doubts {
		body, err := load()
		return body, bypass, err
	}
	old, _ := held.([]byte)
	if old != nil && !bytes.HasPrefix(old, []byte(lease)) {
		return old, hit, nil
	}
	body, err := load()
	if old == nil {
		fill := body
		if err != nil {
			fill = nil
		}
		// An error here ends trust, not the request: the body is PostgreSQL's own.
		_, _ = c.do("EVALSHA", fillScript.Hash(), 2, key, marks(key), token, fill, int(c.ttl.Seconds()))
	}
	return body, miss, err
}

// fillScript puts a body where the reader's lease still stands and no writer is at work, or else gives the lease
// back; so it does with an empty body, which says that there is nothing to fill.
var fillScript = redis.NewScript(2, `
	local key, marks, token, body, ttl = KEYS[1], KEYS[2], ARGV[1], ARGV[2], ARGV[3]
	if redis.call('GET', key) ~= token then return end
	redis.call('ZREMRANGEBYSCORE', marks, '-inf', '(' .. redis.call('TIME')[1])
	if body ~= '' and redis.call('EXISTS', marks) == 0 then
		redis.call('SET', key, body, 'EX', ttl)
	else
		redis.call('DEL', key)
	end`)

// announceScript marks the keys as being written, until a time on Redis's own clock, and empties them. A script is
// a transaction, like MULTI, that can read that clock. The sets of marks have no TTL, so that a Redis which makes
// room by evicting keys that have one leaves them alone.
var announceScript = redis.NewScript(-1, `
	local expires = redis.call('TIME')[1] + ARGV[2]
	for i = 1, #KEYS, 2 do
		redis.call('ZADD', KEYS[i + 1], expires, ARGV[1])
		redis.call('DEL', KEYS[i])
	end`)

// retractScript takes the marks away and empties the keys once more.
var retractScript = redis.NewScript(-1, `
	for i = 1, #KEYS, 2 do
		redis.call('ZREM', KEYS[i + 1], ARGV[1])
		redis.call('DEL', KEYS[i])
	end`)

// marks names the sorted set of the writers at work on key.
func marks(key string) string { return "writers:" + key }

// Write runs change, which must change the rows behind keys in one statement on the connection it is given, so that
// no reader can find an old body once Write has returned, nor once anybody has seen the new rows. The change goes on
// when the context ends. The error is change's, the context's, or says that PostgreSQL could not be reached.
func (c *Cache) Write(ctx context.Context, keys []string, change func(context.Context, *sql.Conn) error) error {
	if err := ctx.Err(); err != nil { // nobody waits for it
		return err
	}
	_, err := within(ctx, func(ctx context.Context) (struct{}, error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), statementTimeout)
		defer cancel()
		// The connection comes first: a mark must last for the statement, not for the wait before it. On a
		// connection of its own a statement is sent once, while sql.DB sends it again when a connection breaks.
		conn, err := c.db.Conn(ctx)
		if err != nil {
			return struct{}{}, err
		}
		defer conn.Close() // returns it to the pool
		return struct{}{}, c.write(ctx, conn, keys, change)
	})
	return err
}

// write announces the change, makes it, and retracts the announcement. Where Redis could not be reached for that,
// PostgreSQL tells the other replicas.
func (c *Cache) write(ctx context.Context, conn *sql.Conn, keys []string, change func(context.Context, *sql.Conn) error) error {
	w := &write{token: rand.Text(), keys: keys}
	c.mu.Lock()
	c.writes[w.token] = w
	c.mu.Unlock()

	var err error
	announced := c.send(announceScript, w)
	if !announced { // then the trigger notifies, with the commit and not after it, as it does for other sessions
		_, err = conn.ExecContext(ctx, `SET application_name = 'desafio3 without redis'`)
		defer func() { _, _ = conn.ExecContext(ctx, `RESET application_name`) }() // if not, it notifies more than it must
	}
	if err == nil {
		err = change(ctx, conn)
	}
	if outcomeUnknown(err) {
		c.forget(w) // it may yet be committed: the marks stay until they expire
		return err
	}
	c.mu.Lock()
	w.over = true
	sent := w.sent
	c.mu.Unlock()
	retracted := c.send(retractScript, w)
	if retracted || !sent {
		c.forget(w) // if not, trust is only won back together with the removal of the marks
	}
	if err == nil && announced && !retracted { // Redis has gone meanwhile, perhaps for another one, which has no mark
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), statementTimeout)
		defer cancel()
		_, err = conn.ExecContext(ctx, `SELECT pg_notify('products', $1)`, strings.TrimPrefix(keys[len(keys)-1], keyPrefix))
	}
	return err
}

// send runs a writer's script, on the pool or, while the cache is not trusted, on a connection of its own, and
// reports whether Redis has done it. When Redis was last found unreachable, it does not wait for it again.
func (c *Cache) send(script *redis.Script, w *write) bool {
	trusted := c.trusted()
	if !trusted && !c.reachable.Load() {
		return false
	}
	c.mu.Lock()
	w.sent = true
	c.mu.Unlock()
	if trusted {
		_, err := c.do("EVALSHA", w.args(script.Hash())...)
		return err == nil
	}
	conn, err := c.dial(context.Background())
	return c.use(conn, err, func(conn redis.Conn) error { return w.run(conn, script) }) == nil
}

// args are those of announceScript or retractScript, after what is given.
func (w *write) args(first ...any) redis.Args {
	args := append(redis.Args(first), len(w.keys)*2)
	for _, key := range w.keys {
		args = append(args, key, marks(key))
	}
	return append(args, w.token, int(markLife.Seconds()))
}

// run runs announceScript or retractScript.
func (w *write) run(conn redis.Conn, script *redis.Script) error {
	_, err := script.Do(conn, w.args()...)
	return err
}

func (c *Cache) forget(w *write) {
	c.mu.Lock()
	delete(c.writes, w.token)
	c.mu.Unlock()
}

// do has a command sent to Redis, and returns the answer. Commands that come while others are under way wait and are
// sent together, in one round trip. The time is bounded: redisTimeout, or what a new connection takes, for those and
// as much for its own.
func (c *Cache) do(name string, args ...any) (any, error) {
	q := &command{name: name, args: args, done: make(chan struct{})}
	c.mu.Lock()
	c.queue = append(c.queue, q)
	if c.senders < maxSenders {
		c.senders++
		go c.sendQueue()
	}
	c.mu.Unlock()
	<-q.done
	return q.reply, q.err
}

// sendQueue sends the commands that wait, all at once, until none waits. Once trust has ended, those who still wait for
// Redis need not wait for the same timeout again.
func (c *Cache) sendQueue() {
	for {
		runtime.Gosched() // those who have just been answered may come with more
		c.mu.Lock()
		batch := c.queue
		c.queue = nil
		if len(batch) == 0 {
			c.senders--
			c.mu.Unlock()
			return
		}
		c.mu.Unlock()
		err := errors.New("the cache is not trusted")
		if c.trusted() {
			err = c.exchange(batch)
		}
		for _, q := range batch {
			q.err = cmp.Or(q.err, err)
			close(q.done)
		}
	}
}

// exchange sends a batch of commands and receives the answers, within redisTimeout. An error ends trust.
func (c *Cache) exchange(batch []*command) error {
	deadline := time.Now().Add(redisTimeout)
	return c.command(func(conn redis.Conn) error {
		for _, q := range batch {
			if err := conn.Send(q.name, q.args...); err != nil {
				return err
			}
		}
		if err := conn.Flush(); err != nil {
			return err
		}
		for _, q := range batch {
			// Zero would be no limit at all.
			if q.reply, q.err = redis.ReceiveWithTimeout(conn, max(time.Until(deadline), time.Millisecond)); q.err != nil {
				return q.err
			}
		}
		return nil
	})
}

// command runs f with a connection of the pool, for which it waits no longer than redisTimeout. An error ends trust.
func (c *Cache) command(f func(redis.Conn) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), redisTimeout)
	defer cancel()
	conn, err := c.pool.GetContext(ctx)
	return c.use(conn, err, f)
}

// use runs f with a connection, if there is one, and closes it. An error ends trust.
func (c *Cache) use(conn redis.Conn, err error, f func(redis.Conn) error) error {
	if err == nil {
		err = f(conn)
		_ = conn.Close() // a pool's connection goes back to the pool
	}
	if err != nil {
		if _, answered := errors.AsType[redis.Error](err); !answered {
			c.reachable.Store(false)
		}
		c.distrust(err)
	}
	return err
}

// connect dials Redis and asks who it is. A Redis older than 7.0 lacks SET NX GET, and one that evicts keys without
// a TTL could forget a writer: both are refused. One that is not the one last connected to may hold anything, an old
// snapshot for example: that ends trust.
func (c *Cache) connect(ctx context.Context, address, password string) (redis.Conn, error) {
	conn, err := redis.DialContext(ctx, "tcp", address, redis.DialPassword(password), redis.DialConnectTimeout(redisDialTimeout),
		redis.DialReadTimeout(redisTimeout), redis.DialWriteTimeout(redisTimeout))
	if err != nil {
		return nil, err
	}
	info, err := infoOf(conn, redisDialTimeout, "server", "memory")
	switch major, _ := strconv.Atoi(strings.Split(info["redis_version"], ".")[0]); {
	case err != nil:
	case major < 7:
		err = fmt.Errorf("redis %s is too old: 7.0 or newer is needed", info["redis_version"])
	case strings.HasPrefix(info["maxmemory_policy"], "allkeys"):
		err = fmt.Errorf("redis may evict any key (maxmemory-policy %s): volatile-lru or noeviction is needed", info["maxmemory_policy"])
	}
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.runID != info["run_id"] {
		uptime, _ := strconv.Atoi(info["uptime_in_seconds"])
		c.runID = info["run_id"]
		c.redisSince = time.Now().Add(-time.Duration(max(0, uptime-1)) * time.Second) // whole seconds, rounded
		c.distrust(errors.New("another redis, or a restarted one, answers"))
	} else if !c.reachable.Load() {
		c.redisSince = time.Now()
	}
	return conn, nil
}

// infoOf returns the fields of some of INFO's sections. Redis older than 7.0 knows only one section at a time.
func infoOf(conn redis.Conn, timeout time.Duration, sections ...string) (map[string]string, error) {
	fields := map[string]string{}
	for _, section := range sections {
		text, err := redis.String(redis.DoWithTimeout(conn, timeout, "INFO", section))
		if err != nil {
			return fields, err
		}
		for line := range strings.Lines(text) {
			if name, value, ok := strings.Cut(strings.TrimSpace(line), ":"); ok {
				fields[name] = value
			}
		}
	}
	return fields, nil
}

func (c *Cache) trusted() bool { return c.trustedAt.Load() == c.doubts.Load() }

// distrust ends trust: reads go to PostgreSQL until Run has dropped every key.
func (c *Cache) distrust(reason error) {
	c.doubtedAt.Store(time.Now().UnixNano())
	if doubts := c.doubts.Add(1); c.trustedAt.Load() == doubts-1 {
		slog.Warn("cache not trusted", "reason", reason)
	}
}

// Run hears of other sessions' changes and keeps trust, or wins it back, until the context ends.
func (c *Cache) Run(ctx context.Context) {
	go c.hear()
	go repeat(ctx, "not listening", func() (bool, error) {
		err := c.listener.Listen("products") // waits for PostgreSQL
		c.listening.Store(err == nil)
		return err == nil, err
	})
	defer c.listener.Close()
	repeat(ctx, "cache not in use yet", func() (bool, error) { return false, c.check(ctx) })
}

// check asks Redis and the listener's connection whether they are there; without trust, it tries to win it back.
func (c *Cache) check(ctx context.Context) error {
	// Whatever is with Redis: a connection that PostgreSQL is not heard on for a while counts as lost.
	listenerErr := c.listener.Ping()
	if c.trusted() {
		if listenerErr != nil {
			c.distrust(listenerErr)
		}
		_, err := c.do("PING")
		return err
	}
	conn, err := c.dial(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	doubts := c.doubts.Load()
	if err := c.restore(conn); err != nil {
		return err
	}
	c.trustedAt.Store(doubts) // which is not the number of doubts any more, if another came up meanwhile
	if c.trusted() {
		slog.Info("cache trusted")
	}
	return nil
}

// restore makes Redis fit to be trusted: the writers at work are announced to it, and it holds no body.
func (c *Cache) restore(conn redis.Conn) error {
	c.mu.Lock()
	writes := slices.Collect(maps.Values(c.writes))
	since := c.redisSince
	c.mu.Unlock()
	for _, w := range writes {
		if err := c.announceAgain(conn, w); err != nil {
			return err
		}
	}
	// Another replica may not have found Redis again yet: its writers are not announced, or pass Redis by. The grace
	// is what it may need to run into a timeout and to connect anew.
	if time.Since(since) < redisGrace {
		return errors.New("redis has only just come back")
	}
	if !c.listening.Load() {
		return errors.New("not listening to PostgreSQL yet")
	}
	if err := c.listener.Ping(); err != nil {
		return fmt.Errorf("the listener has no connection: %w", err)
	}
	// A Redis that is full, or only a replica, fails here rather than on the first request.
	if _, err := conn.Do("SET", keyPrefix+"probe", "", "EX", 1); err != nil {
		return err
	}
	for _, script := range []*redis.Script{fillScript, announceScript, retractScript} {
		if err := script.Load(conn); err != nil {
			return err
		}
	}
	_, err := dropAll(conn)
	return err
}

// announceAgain puts the mark of a write that is at work into Redis, or takes away one that was left behind when
// Redis did not answer its writer.
func (c *Cache) announceAgain(conn redis.Conn, w *write) error {
	c.mu.Lock()
	w.sent = true
	over := w.over
	c.mu.Unlock()
	if !over {
		if err := w.run(conn, announceScript); err != nil {
			return err
		}
		c.mu.Lock()
		over = w.over // meanwhile: then its own retraction may have come too early
		c.mu.Unlock()
	}
	if !over {
		return nil
	}
	defer c.forget(w)
	return w.run(conn, retractScript)
}

// dropAll deletes every key of the cache, but not the marks of the writers, and returns how many there were.
func dropAll(conn redis.Conn) (dropped int, err error) {
	err = scan(conn, func(keys []any) error {
		n, err := redis.Int(conn.Do("UNLINK", keys...))
		dropped += n
		return err
	})
	return dropped, err
}

// scan calls f with the cache's keys, some at a time, without holding up Redis as KEYS would.
func scan(conn redis.Conn, f func(keys []any) error) error {
	began := time.Now()
	for cursor := "0"; time.Since(began) < requestTimeout; {
		reply, err := redis.Values(conn.Do("SCAN", cursor, "MATCH", keyPrefix+"*", "COUNT", 1000))
		if err != nil {
			return err
		}
		var keys []any
		if _, err := redis.Scan(reply, &cursor, &keys); err != nil {
			return err
		}
		if len(keys) > 0 {
			if err := f(keys); err != nil {
				return err
			}
		}
		if cursor == "0" {
			return nil
		}
	}
	return context.DeadlineExceeded
}

// hear drops what other sessions changed. The ids that come faster than they can be dropped are not worth dropping
// one by one: they end trust, and all keys are dropped once, when it is calm again.
func (c *Cache) hear() {
	for n := range c.listener.Notify {
		switch {
		case n == nil: // a new connection: its loss has ended trust already
		case n.Extra == "", len(c.listener.Notify) == cap(c.listener.Notify), !c.trusted():
			c.distrust(errors.New("other sessions changed everything, or more than can be dropped key by key"))
		default:
			if _, err := c.do("UNLINK", keyAll, keyPrefix+n.Extra); err != nil {
				c.distrust(err)
			}
		}
	}
}

// Clear deletes every key of the cache and returns how many there were.
func (c *Cache) Clear(ctx context.Context) (cleared int, err error) {
	conn, err := c.dial(context.WithoutCancel(ctx))
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	return dropAll(conn)
}
