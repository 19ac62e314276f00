package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"
)

// TestUnitPaging sends queries that must be refused. Of several faults the service always reports the same one.
func TestUnitPaging(t *testing.T) {
	for says, queries := range map[string]string{
		"malformed": "category=a;b %zz", "more than once": "limit=1&limit=2", "colour": "colour=red",
		"limit":    "limit=0 limit=1001 limit=x limit=+1 limit=01",
		"after":    "after=-1 after=0 after=x" + strings.Repeat(" limit=0&after=x&category=%00&colour=red&size=1", 50),
		"category": "category=%00 category=%ff category=" + strings.Repeat("a", 101),
	} {
		for query := range strings.FieldsSeq(queries) {
			_, err := parsePage(query)
			p, ok := errors.AsType[*problem](err)
			expect(t, ok && p.Status == 400 && strings.Contains(p.Detail, says), "%s: %v", query, err)
		}
	}
}

// FuzzDecode checks that a body that is accepted is one that PostgreSQL will take, and that none crashes the decoder.
func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"name":"a","description":"\ud83d\ude00","price":1e2,"stock":3,"category":""}`))
	f.Add([]byte(`{"name":"\\ud800","price":99999999.99}`))
	isAcceptedPrice := regexp.MustCompile(`^\d{1,8}(\.\d{1,2})?$`).MatchString
	f.Fuzz(func(t *testing.T, body []byte) {
		in, err := decodeFields(body)
		if err = cmp.Or(err, in.check(true)); err != nil {
			p, ok := errors.AsType[*problem](err)
			expect(t, ok && (p.Status == 400 || p.Status == 422), "%q: %v", body, err)
			return
		}
		var plain struct{ Name string }
		check(json.Unmarshal(body, &plain))
		expect(t, strings.TrimSpace(plain.Name) == in.Name.String, "%q became %q", body, in.Name.String)
		expect(t, !strings.Contains(plain.Name, "\x00"), "a NUL was accepted in %q", body)
		expect(t, isAcceptedPrice(in.Price.String), "the price of %q became %s", body, in.Price.String)
	})
}

// TestProducts goes through the life of a product, and through every endpoint that serves it.
func TestProducts(t *testing.T) {
	s := startAlone(t)
	equal(t, "the empty list", s.read("/products", "", miss).body, `{"count":0,"products":[]}`+"\n")
	const rest = `"stock":100,"category":"livros"`
	a := s.want(201, "POST", "/products", `{"name":"  Café <1>  ","description":"d","price":99.9,`+rest+`}`)
	path := a.header.Get("Location")
	a.contains(`{"id":` + path[len("/products/"):] + `,"name":"Café <1>","description":"d","price":99.90,` + rest)
	// Each kind of write makes the next read of the list a miss, and the one after it a hit with the same bytes.
	read := func(path string) string {
		t.Helper()
		body := s.read(path, "", miss).body
		equal(t, "a hit", s.read(path, "", hit).body, body)
		return body
	}
	equal(t, "what was created", read(path), a.body)
	equal(t, "the list", read("/products"), `{"count":1,"products":[`+strings.TrimSpace(a.body)+"]}\n")
	changed := s.want(200, "PUT", path, `{"stock":0}`)
	changed.contains(`"name":"Café <1>","description":"d","price":99.90,"stock":0,"category":"livros"`)
	equal(t, "what was changed", read(path), changed.body)
	read("/products")
	equal(t, "the answer to DELETE", s.want(204, "DELETE", path, "").body, "")
	s.want(404, "GET", path, "")
	s.want(404, "PUT", path, `{"stock":1}`)
	s.want(404, "DELETE", path, "")
	read("/products")
	equal(t, "the clearing", s.want(200, "DELETE", "/cache/clear", "").body, `{"cleared":1}`+"\n")
	// A panic in the goroutine of a lookup is a 500. It does not end the process.
	db := s.db
	s.db = nil
	s.want(500, "GET", "/products", "")
	s.db = db
	s.read("/products", "", miss)
}

// TestBodies sends what must be refused, and checks each time that nothing was changed. Then it sends what is accepted.
func TestBodies(t *testing.T) {
	s := startAlone(t)
	path := s.create(`{"name":"a","price":1,"id":99,"created_at":"now"}`)
	long := func(n int) string { return strings.Repeat("é", n) }
	const rows = `SELECT coalesce(string_agg(p::text, ' ' ORDER BY id), '') FROM products p` // all of them, as text
	refuse := func(status int, method, path, body, says string, headers ...string) {
		t.Helper()
		before := ask[string](s.psql, rows)
		a := s.want(status, method, path, body, headers...)
		a.contains(says)
		equal(t, "whether it says what is allowed", a.header.Get("Allow") != "", status == 405)
		equal(t, "all rows", ask[string](s.psql, rows), before)
	}
	for says, bodies := range map[string][]string{
		"JSON":   {`{"name":"a","price":1`, `{"name":"a","price":1} {}`, `{"price":1,}`, `{"name":"a","price":NaN}`},
		"object": {`["a"]`, `null`},
		"colour": {`{"name":"a","price":1,"colour":"red"}`},
		"name":   {`{"name":1,"price":1}`},
		"price":  {`{"name":"a","price":"1"}`, `{"name":"a","price":null}`},
		"NUL":    {`{"name":"a\u0000","price":1}`},
		"UTF-8":  {"{\"name\":\"\xff\",\"price\":1}"},
	} {
		for _, body := range bodies {
			refuse(400, "POST", "/products", body, says)
		}
	}
	refuse(400, "POST", "/products", "{\"name\":\"a\x00\",\"price\":1}", "JSON")
	refuse(400, "PUT", path, `{"name":null}`, "name")
	refuse(413, "POST", "/products", `{"name":"`+strings.Repeat("a", 1<<20)+`","price":1}`, "1 MiB")
	began := time.Now()
	conn := s.dial(postHeader + "Transfer-Encoding: chunked\r\n\r\n")
	_, _ = fmt.Fprintf(conn, "%x\r\n%s", maxBody+2, strings.Repeat("a", maxBody+2)) // fails if the server has closed it
	wantStatus(t, conn, 413)
	within(t, time.Since(began), 3*time.Second, "the answer to a body that is too large and never ends")
	refuse(415, "PUT", path, `{"stock":1}`, "Content-Encoding", "Content-Encoding", "gzip")
	refuse(422, "POST", "/products", `{}`, `"price":"is required"`)
	refuse(422, "PUT", path, `{}`, "no field")
	refuse(422, "PUT", path, `{"name":" "}`, `"name":`)
	refuse(422, "PUT", path, `{"name":"`+long(201)+`"}`, `"name":`)
	refuse(422, "PUT", path, `{"stock":-1,"description":"`+long(2001)+`","category":"`+long(101)+`"}`,
		`{"category":"must have at most 100 characters","description":"must have at most 2000 characters","stock":`)
	refuse(404, "GET", "/products/", "", "endpoint")
	refuse(405, "PATCH", path, "", "endpoint")
	refuse(400, "GET", "/products?colour=red", "", "colour")
	for rule, numbers := range map[string]string{
		`"price":"must be a number from 0 to 99999999.99 with at most 2 decimals"`: `-0.01 0.001 100000000 1e2 1.500E+1
			0.300 -0 1e400 ` + strings.Repeat("9", 1000),
		`"stock":"must be a whole number from 0 to 2147483647"`: `-1 1.5 1.0 1e2 2147483648 9223372036854775808`,
	} {
		for number := range strings.FieldsSeq(numbers) {
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

	// What is unusual but right, for example what was read and then changed.
	read := s.read(path, stockIs(0)).body
	s.want(200, "PUT", path, strings.Replace(read, stockIs(0), stockIs(5), 1)).contains(stockIs(5))
	accept := func(body, want string) {
		t.Helper()
		a := s.want(201, "POST", "/products", body)
		a.contains(want)
		equal(t, "what was created", s.want(200, "GET", a.header.Get("Location"), "").body, a.body)
	}
	for sent, kept := range map[string]string{
		"0.10": "0.10", "99999999.99": "99999999.99", "0": "0.00", "12": "12.00", "12.5": "12.50",
	} {
		accept(`{"name":"a","price":`+sent+`}`, `"price":`+kept+`,`)
	}
	accept(`{"name":"a","name":"b","price":1}`, `"name":"b",`)
	accept(`{"name":"\ud800","price":1}`, "\"name\":\"\uFFFD\",")
	accept(`{"name":"a","price":1}`, `"description":"","price":1.00,"stock":0,"category":"",`)
	accept(`{"name":"\ud83d\ude00 \\ud800 ' \" $1 ; --","price":1}`, `"name":"😀 \\ud800 ' \" $1 ; --",`)
	accept(`{"name":"`+strings.Repeat("é", 200)+`","price":1}`, `"name":"`+strings.Repeat("é", 200)+`",`)
	accept("\n {\"name\" : \"\uFFFD\", \"price\":1} \n", "\"name\":\"\uFFFD\",")
	s.want(201, "POST", "/products", `{"name":"a","price":1}`, "Content-Type", "application/json; charset=utf-8")
	s.want(201, "POST", "/products", `{"name":"a","price":1}`, "Sec-Fetch-Site", "same-origin")
	s.want(200, "HEAD", "/products", "")
}

// walk reads a list and all that follow it, and returns the number of products in each. Their ids must rise.
func (s *testServer) walk(path string) (counts []int) {
	for last := int64(0); path != ""; {
		a := s.want(200, "GET", path, "")
		expect(s.t, len(a.body) <= maxAnswer+1000, "%s: %d bytes", path, len(a.body))
		equal(s.t, "whether it is a page and not cached", a.source() == "", strings.Contains(path, "?"))
		var list struct {
			Count    int
			Products []product
			Next     string
		}
		check(json.Unmarshal([]byte(a.body), &list))
		equal(s.t, "count of "+path, list.Count, len(list.Products))
		for _, p := range list.Products {
			expect(s.t, p.ID > last, "%s: %d after %d", path, p.ID, last)
			last = p.ID
		}
		counts, path = append(counts, list.Count), list.Next
	}
	return counts
}

// TestPages reads lists page by page, and must find every product once. The last list is larger than an answer may be.
func TestPages(t *testing.T) {
	s := startAlone(t)
	must(s.db.Exec(`INSERT INTO products (name, price, category)
		SELECT 'p' || n, n, CASE n % 2 WHEN 0 THEN 'a&b' ELSE '' END FROM generate_series(1, 25) n`))
	for path, want := range map[string]string{
		"/products?limit=10":               "[10 10 5]",
		"/products?limit=25":               "[25]",
		"/products?category=a%26b&limit=5": "[5 5 2]",
		"/products?category=":              "[13]",
		"/products?category=none":          "[0]",
		"/products?after=20":               "[5]",
	} {
		equal(t, path, fmt.Sprint(s.walk(path)), want)
	}
	must(s.db.Exec(insertLarge, 5000))
	count := 0
	for _, products := range s.walk("/products") {
		count += products
	}
	equal(t, "products", count, 5025)
	s.awaitHit("/products", "")
}

const insertLarge = `INSERT INTO products (name, price, description)
	SELECT 'p' || n, n, repeat('x', 2000) FROM generate_series(1, $1::int) n`

// TestInformation reads what the service says of itself and its servers: what a newcomer sees first, and the figures.
func TestInformation(t *testing.T) {
	s := startAlone(t)
	s.create(`{"name":"a","price":0.10,"stock":3,"category":"x"}`)
	s.create(`{"name":"b","price":99999999.99,"stock":2147483647,"category":"y"}`)
	s.read("/products", "", miss)
	s.read("/products", "", hit)
	s.read("/products", "", hit)
	const server = `\{"status":"connected","address":"127.0.0.1:\d+","version":"[\d.]+[^"]*","latency_ms":[\d.]+\}`
	for path, want := range map[string]string{
		"/": `^\{"name":"desafio3","version":"[^"]+","endpoints":\{.*"GET /products":"[^"]+"`,
		"/services": `^\{"web":\{"status":"running","address":"127.0.0.1:\d+","version":"[^"]+","latency_ms":0,` +
			`"uptime":"\d+s","hostname":"[^"]+","go":"go[^"]+"\},"postgres":` + server + `,"redis":` + server + `\}\n$`,
		"/health": `^\{"status":"healthy","database":"connected","cache":"connected","timestamp":"[-\d]+T[:.\d]+Z"\}\n$`,
		// The value is exact, where a float would have lost the cents.
		"/stats": `"status":"connected","trusted":true,"hits":2,"misses":1,"bypasses":0,"hit_rate":0.667,"keys":1,` +
			`"ttl_seconds":300,"memory_used":".*"products":2,"total_stock":2147483650,` +
			`"inventory_value":214748364678525163.83,"products_per_category":\{"x":1,"y":1\}.*"max":` + fmt.Sprint(poolSize),
	} {
		body := s.want(200, "GET", path, "").body
		expect(t, regexp.MustCompile(want).MatchString(body), "%s: %s", path, body)
	}
	list := s.want(200, "GET", "/", "").body
	equal(t, "texts in "+list, strings.Count(list, `":"`), 2+len(s.endpoints()))
}
