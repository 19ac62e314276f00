package main

import (
	"encoding/json"
	"fmt"
	"regexp"
	"strings"
	"testing"
)

// TestProducts goes through the life of a product, and through every endpoint that serves it.
func TestProducts(t *testing.T) {
	s := startAlone(t)
	equal(t, "the empty list", s.wantSource(miss, "/products"), `{"count":0,"products":[]}`+"\n")
	a := s.want(201, "POST", "/products", `{"name":"  Café <1>  ","description":"d","price":99.9,"stock":100,"category":"livros"}`)
	path := a.header.Get("Location")
	a.says(`{"id":` + strings.TrimPrefix(path, "/products/") + `,"name":"Café <1>","description":"d","price":99.90,"stock":100,"category":"livros"`)
	// Each kind of write makes the next read of the list a miss, and the one after it a hit with the same bytes.
	read := func(path string) string {
		t.Helper()
		body := s.wantSource(miss, path)
		equal(t, "a hit", s.wantSource(hit, path), body)
		return body
	}
	equal(t, "what was created", read(path), a.body)
	equal(t, "the list", read("/products"), `{"count":1,"products":[`+strings.TrimSpace(a.body)+"]}\n")
	changed := s.want(200, "PUT", path, `{"stock":0}`)
	changed.says(`"name":"Café <1>","description":"d","price":99.90,"stock":0,"category":"livros"`)
	equal(t, "what was changed", read(path), changed.body)
	read("/products")
	equal(t, "the answer to DELETE", s.want(204, "DELETE", path, "").body, "")
	s.want(404, "GET", path, "")
	s.want(404, "PUT", path, `{"stock":1}`)
	s.want(404, "DELETE", path, "")
	read("/products")
	equal(t, "the clearing", s.want(200, "DELETE", "/cache/clear", "").body, `{"cleared":1}`+"\n")
	s.wantSource(miss, "/products")
}

// TestRefusals sends what must be refused, and checks each time that nothing was changed.
func TestRefusals(t *testing.T) {
	s := startAlone(t)
	path := s.create(`{"name":"a","price":1}`)
	long := func(n int) string { return strings.Repeat("é", n) }
	db := psql(t, s.cfg)
	const rows = `SELECT coalesce(string_agg(p::text, ' ' ORDER BY id), '') FROM products p` // all of them, as text
	refuse := func(status int, method, path, body, says string, headers ...string) {
		t.Run(fmt.Sprintf("%s %s %.60s", method, path, body), func(t *testing.T) {
			before := ask[string](db, rows)
			a := (&testServer{server: s.server, t: t, url: s.url}).want(status, method, path, body, headers...)
			a.says(says)
			equal(t, "whether it says what is allowed", a.header.Get("Allow") != "", status == 405)
			equal(t, "all rows", ask[string](db, rows), before)
		})
	}
	refuse(400, "POST", "/products", `{"name":"a","price":1`, "JSON")
	refuse(400, "POST", "/products", `["a"]`, "object")
	refuse(400, "POST", "/products", `null`, "object")
	refuse(400, "POST", "/products", `{"name":"a","price":1} {}`, "JSON")
	refuse(400, "POST", "/products", `{"name":"a","price":1,}`, "JSON")
	refuse(400, "POST", "/products", `{"name":"a","price":1,"colour":"red"}`, "colour")
	refuse(400, "POST", "/products", `{"name":1,"price":1}`, "name")
	refuse(400, "POST", "/products", `{"name":"a","price":"1"}`, "price")
	refuse(400, "POST", "/products", `{"name":"a","price":null}`, "price")
	refuse(400, "PUT", path, `{"name":null}`, "name")
	refuse(400, "POST", "/products", `{"name":"a","price":NaN}`, "JSON")
	refuse(400, "POST", "/products", `{"name":"a\u0000","price":1}`, "NUL")
	refuse(400, "POST", "/products", "{\"name\":\"a\x00\",\"price\":1}", "JSON")
	refuse(400, "POST", "/products", "{\"name\":\"\xff\",\"price\":1}", "UTF-8")
	refuse(400, "PUT", path, `{"category":"\u0000"}`, "NUL")
	refuse(413, "POST", "/products", `{"name":"`+strings.Repeat("a", 1<<20)+`","price":1}`, "1 MiB")
	refuse(422, "POST", "/products", `{}`, `"price":"is required"`)
	refuse(422, "PUT", path, `{}`, "no field")
	refuse(422, "PUT", path, `{"name":" "}`, `"name":`)
	refuse(422, "PUT", path, `{"name":"`+long(201)+`"}`, `"name":`)
	refuse(422, "PUT", path, `{"stock":-1,"description":"`+long(2001)+`","category":"`+long(101)+`"}`, `{"category":"must have at most 100 characters","description":"must have at most 2000 characters","stock":`)
	refuse(404, "PUT", "/products/999999", `{"stock":1}`, "999999")
	refuse(404, "GET", "/products/", "", "endpoint")
	refuse(404, "GET", "/nothing", "", "endpoint")
	refuse(405, "PATCH", path, "", "endpoint")
	refuse(405, "POST", "/health", "", "endpoint")
	refuse(400, "GET", "/products?colour=red", "", "colour")
	for rule, prices := range map[string]string{
		`"price":"must be a number from 0 to 99999999.99 with at most 2 decimals"`: `-0.01 0.001 100000000 1e2 1.500E+1 0.300 -0 1e400 ` + strings.Repeat("9", 1000),
		`"stock":"must be a whole number from 0 to 2147483647"`:                    `-1 1.5 1.0 1e2 2147483648 9223372036854775808`,
	} {
		for _, number := range strings.Fields(prices) {
			refuse(422, "PUT", path, `{`+rule[:8]+number+`}`, rule)
		}
	}
	for _, id := range strings.Fields("0 -1 +1 01 1.0 9223372036854775808 x %00") {
		refuse(404, "GET", "/products/"+id, "", "does not exist")
		refuse(404, "PUT", "/products/"+id, `{"stock":1}`, "does not exist")
		refuse(404, "DELETE", "/products/"+id, "", "does not exist")
	}
	refuse(415, "POST", "/products", `{"name":"a","price":1}`, "application/json", "Content-Type", "text/plain")
	refuse(415, "POST", "/products", `{"name":"a","price":1}`, "application/json", "Content-Type", "")
	refuse(403, "DELETE", path, "", "another site", "Sec-Fetch-Site", "cross-site")
	refuse(403, "POST", "/products", `{"name":"a","price":1}`, "another site", "Origin", "https://elsewhere.example")
}

// TestAccepted sends what is unusual but right.
func TestAccepted(t *testing.T) {
	s := startAlone(t)
	accept := func(body, want string) {
		t.Helper()
		a := s.want(201, "POST", "/products", body)
		a.says(want)
		equal(t, "what was created", s.send("GET", a.header.Get("Location"), "").body, a.body)
	}
	accept(`{"name":"a","price":0.10}`, `"price":0.10,`)
	accept(`{"name":"a","price":99999999.99}`, `"price":99999999.99,`)
	accept(`{"name":"a","price":0}`, `"price":0.00,`)
	accept(`{"name":"a","price":12}`, `"price":12.00,`)
	accept(`{"name":"a","price":12.5}`, `"price":12.50,`)
	accept(`{"name":"a","name":"b","price":1}`, `"name":"b",`)
	accept(`{"name":"\ud800","price":1}`, "\"name\":\"\uFFFD\",")
	accept(`{"name":"a","price":1,"stock":2147483647}`, `"stock":2147483647,`)
	accept(`{"name":"a","price":1}`, `"description":"","price":1.00,"stock":0,"category":"",`)
	accept(`{"name":"\ud83d\ude00 \\ud800 ' \" $1 ; --","price":1}`, `"name":"😀 \\ud800 ' \" $1 ; --",`)
	accept(`{"name":"`+strings.Repeat("é", 200)+`","price":1}`, `"name":"`+strings.Repeat("é", 200)+`",`)
	accept("\n {\"name\" : \"\uFFFD\", \"price\":1} \n", "\"name\":\"\uFFFD\",")
	s.want(201, "POST", "/products", `{"name":"a","price":1}`, "Content-Type", "application/json; charset=utf-8")
	s.want(201, "POST", "/products", `{"name":"a","price":1}`, "Sec-Fetch-Site", "same-origin")
	s.want(200, "HEAD", "/products", "")
}

// TestPages walks through a category page by page and must meet every product of it once.
func TestPages(t *testing.T) {
	s := startAlone(t)
	must(s.db.Exec(`INSERT INTO products (name, price, category) SELECT 'p' || n, n, CASE n % 2 WHEN 0 THEN 'a&b' ELSE '' END FROM generate_series(1, 25) n`))
	walk := func(path string, pages ...int) { // products a page
		t.Helper()
		last := int64(0)
		for i, want := range pages {
			a := s.want(200, "GET", path, "")
			equal(t, "Cache-Status of "+path, a.source(), "")
			var list struct {
				Count    int
				Products []product
				Next     string
			}
			check(json.Unmarshal([]byte(a.body), &list))
			if list.Count != want || len(list.Products) != want || (list.Next == "") != (i == len(pages)-1) {
				t.Errorf("%s: count %d, %d products, next %q; want %d", path, list.Count, len(list.Products), list.Next, want)
			}
			for _, p := range list.Products {
				if p.ID <= last {
					t.Errorf("%s: %d after %d", path, p.ID, last)
				}
				last = p.ID
			}
			path = list.Next
		}
	}
	walk("/products?limit=10", 10, 10, 5)
	walk("/products?limit=25", 25)
	walk("/products?category=a%26b&limit=5", 5, 5, 2)
	walk("/products?category=", 13)
	walk("/products?category=none", 0)
	walk("/products?after=20", 5)
}

// TestStats counts what was asked.
func TestStats(t *testing.T) {
	s := startAlone(t)
	s.create(`{"name":"a","price":0.10,"stock":3,"category":"x"}`)
	s.create(`{"name":"b","price":99999999.99,"stock":2147483647,"category":"y"}`)
	s.wantSource(miss, "/products")
	s.wantSource(hit, "/products")
	s.wantSource(hit, "/products")
	stats := s.want(200, "GET", "/stats", "")
	stats.says(`"status":"connected","trusted":true,"hits":2,"misses":1,"bypasses":0,"hit_rate":0.667,"keys":1,"ttl_seconds":300,"memory_used":"`)
	// The value is exact, where a float would have lost the cents.
	stats.says(`"products":2,"total_stock":2147483650,"inventory_value":214748364678525163.83,"products_per_category":{"x":1,"y":1}`)
	stats.says(fmt.Sprintf(`"max":%d,`, poolSize()))
}

// TestIndexAndServices checks what a newcomer sees first.
func TestIndexAndServices(t *testing.T) {
	s := startAlone(t)
	const server = `\{"status":"connected","address":"127.0.0.1:\d+","version":"[\d.]+[^"]*","latency_ms":[\d.]+\}`
	for path, want := range map[string]string{
		"/": `^\{"name":"desafio3","version":"[^"]+","endpoints":\{.*"GET /products":"[^"]+"`,
		"/services": `^\{"web":\{"status":"running","address":"127.0.0.1:\d+","version":"[^"]+","latency_ms":0,"uptime":"\d+s","hostname":"[^"]+","go":"go[^"]+"\},` +
			`"postgres":` + server + `,"redis":` + server + `\}\n$`,
		"/health": `^\{"status":"healthy","database":"connected","cache":"connected","timestamp":"[-\d]+T[:.\d]+Z"\}\n$`,
	} {
		if body := s.want(200, "GET", path, "").body; !regexp.MustCompile(want).MatchString(body) {
			t.Errorf("%s: %s", path, body)
		}
	}
	list := s.want(200, "GET", "/", "").body
	equal(t, "texts in "+list, strings.Count(list, `":"`), 2+len(s.endpoints()))
}
