package main

import (
	"context"
	"database/sql"
	"errors"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"github.com/gomodule/redigo/redis"
)

// What lies inside a request, with its allocations: go test -run '^$' -bench . in the environment of the tests.

// BenchmarkLookup is Cache.Get, without HTTP: one body in Redis; a key that is emptied before every lookup, so that it
// takes the lease, asks PostgreSQL and fills; and the first by 100 at a time, where an operation is one of the 100.
func BenchmarkLookup(b *testing.B) {
	cfg := testConfig(b)
	s := startServer(b, withDatabase(b, cfg))
	p := s.create(`{"name":"Lamp","price":19.90}`)
	load := func(ctx context.Context) ([]byte, error) {
		var row product
		if err := row.scan(s.db.QueryRowContext(ctx, selectProduct, p.ID)); err != nil {
			return nil, err
		}
		return encode(&row)
	}
	get := func(want source) {
		body, from, err := s.cache.Get(b.Context(), productKey(p.ID), load)
		if err != nil || from != want || len(body) == 0 {
			b.Errorf("got %d bytes, %q, %v; want %q", len(body), from, err, want)
		}
	}
	empty := func() {
		if err := s.cache.command(func(conn redis.Conn) error {
			_, err := conn.Do("DEL", productKey(p.ID))
			return err
		}); err != nil {
			b.Fatal(err)
		}
	}
	b.Run("hit", func(b *testing.B) {
		empty()
		get(miss)
		b.ReportAllocs()
		for b.Loop() {
			get(hit)
		}
	})
	b.Run("miss", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			empty()
			get(miss)
		}
	})
	b.Run("shared by 100", func(b *testing.B) {
		empty()
		get(miss)
		b.ReportAllocs()
		turns := make(chan bool)
		var readers sync.WaitGroup
		for range 100 {
			readers.Go(func() {
				for range turns {
					get(hit)
				}
			})
		}
		for b.Loop() {
			turns <- true
		}
		close(turns)
		readers.Wait()
	})
}

// BenchmarkWrite is Cache.Write: announcing to Redis, one UPDATE, retracting; and the same with a change that does
// nothing, which is what the cache adds to the UPDATE.
func BenchmarkWrite(b *testing.B) {
	s := startServer(b, withDatabase(b, testConfig(b)))
	p := s.create(`{"name":"Lamp","price":19.90}`)
	for name, change := range map[string]func(context.Context, *sql.Conn) error{
		"update": func(ctx context.Context, conn *sql.Conn) error {
			var row product
			return row.scan(conn.QueryRowContext(ctx, updateProduct, p.ID, nil, nil, nil, 7, nil))
		},
		"nothing": func(context.Context, *sql.Conn) error { return nil },
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if err := s.cache.Write(b.Context(), []string{keyAll, productKey(p.ID)}, change); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkDecode is all that is done to a body before SQL: reading, decoding, validating.
func BenchmarkDecode(b *testing.B) {
	for name, body := range map[string]string{
		"valid":   `{"name":"Desk lamp","description":"Warm light, \u00e9tag\u00e8re","price":19.90,"stock":12,"category":"lighting"}`,
		"large":   `{"name":"Desk lamp","price":19.90,"description":"` + strings.Repeat("a", 2000) + `"}`,
		"invalid": `{"name":"","price":-1,"stock":1.5}`,
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			b.SetBytes(int64(len(body)))
			for b.Loop() {
				r := httptest.NewRequest("POST", "/products", strings.NewReader(body))
				r.Header.Set("Content-Type", "application/json")
				_, err := readFields(httptest.NewRecorder(), r, true)
				if _, refused := errors.AsType[*problem](err); refused != (name == "invalid") {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkList is the query for the whole list and its encoding.
func BenchmarkList(b *testing.B) {
	s := startServer(b, withDatabase(b, testConfig(b)))
	for _, size := range []struct {
		name  string
		count int
	}{{"8", 8}, {"10000", 10000}} {
		mustExec(b, s.db, "TRUNCATE products")
		mustExec(b, s.db, `INSERT INTO products (name, description, price, stock, category)
			SELECT 'Product ' || n, 'with a description of a usual length', n % 1000 + 0.99, n % 100, 'category ' || n % 10
			FROM generate_series(1, $1::int) n`, size.count)
		b.Run(size.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				rows, err := s.db.QueryContext(b.Context(), selectAll)
				if err != nil {
					b.Fatal(err)
				}
				body, err := encodeList(rows, nil)
				if err != nil {
					b.Fatal(err)
				}
				b.SetBytes(int64(len(body)))
			}
		})
	}
}
