package main

import (
	"database/sql"
	"encoding/json"
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"testing"
)

// TestProducts goes through the life of a product, and through every endpoint that serves it.
func TestProducts(t *testing.T) {
	s := startAlone(t)
	if got, want := s.wantSource(miss, "/products"), `{"count":0,"products":[]}`+"\n"; got != want {
		t.Errorf("the empty list is %q", got)
	}
	a := s.want(201, "POST", "/products", `{"name":"  Café <1>  ","description":"d","price":99.9,"stock":100,"category":"livros"}`)
	path := a.header.Get("Location")
	if !strings.HasPrefix(a.body, `{"id":`+strings.TrimPrefix(path, "/products/")+",") {
		t.Errorf("Location is %q of %s", path, a.body)
	}
	if !strings.Contains(a.body, `"name":"Café <1>","description":"d","price":99.90,"stock":100,"category":"livros"`) {
		t.Errorf("created %s", a.body)
	}
	// Each kind of write makes the next read of the list a miss, and the one after it a hit with the same bytes.
	read := func(path string) string {
		t.Helper()
		body := s.wantSource(miss, path)
		if again := s.wantSource(hit, path); again != body {
			t.Errorf("a hit is %s, a miss was %s", again, body)
		}
		return body
	}
	if body := read(path); body != a.body {
		t.Errorf("read %s, created %s", body, a.body)
	}
	if body, want := read("/products"), `{"count":1,"products":[`+strings.TrimSpace(a.body)+"]}\n"; body != want {
		t.Errorf("the list is %s, want %s", body, want)
	}
	changed := s.want(200, "PUT", path, `{"stock":0}`).body
	if !strings.Contains(changed, `"name":"Café <1>","description":"d","price":99.90,"stock":0,"category":"livros"`) {
		t.Errorf("changed to %s", changed)
	}
	if body := read(path); body != changed {
		t.Errorf("read %s after the change to %s", body, changed)
	}
	read("/products")
	if a := s.want(204, "DELETE", path, ""); a.body != "" {
		t.Errorf("DELETE answered %q", a.body)
	}
	s.want(404, "GET", path, "")
	s.want(404, "PUT", path, `{"stock":1}`)
	s.want(404, "DELETE", path, "")
	read("/products")
	var cleared map[string]int
	if err := json.Unmarshal([]byte(s.want(200, "DELETE", "/cache/clear", "").body), &cleared); err != nil || cleared["cleared"] != 1 {
		t.Errorf("cleared %v, %v", cleared, err)
	}
	s.wantSource(miss, "/products")
}

// TestRefusals sends what must be refused, and checks each time that nothing was changed.
func TestRefusals(t *testing.T) {
	s := startAlone(t)
	path := pathOf(s.create(`{"name":"a","price":1}`))
	long := func(n int) string { return strings.Repeat("é", n) }
	db := psql(t, s.cfg)
	refuse := func(status int, method, path, body, says string, headers ...string) {
		t.Run(fmt.Sprintf("%s %s %.60s", method, path, body), func(t *testing.T) {
			before := rows(t, db)
			a := (&testServer{server: s.server, t: t, url: s.url}).want(status, method, path, body, headers...)
			if !strings.Contains(strings.ReplaceAll(a.body, `\"`, `"`), says) {
				t.Errorf("the error does not say %q: %s", says, a.body)
			}
			if status == 405 && a.header.Get("Allow") == "" {
				t.Error("405 without Allow")
			}
			if after := rows(t, db); after != before {
				t.Errorf("changed from %s to %s", before, after)
			}
		})
	}
	for _, c := range []struct {
		status             int
		method, path, body string
		says               string
	}{
		{400, "POST", "/products", `{"name":"a","price":1`, "JSON"},
		{400, "POST", "/products", `["a"]`, "object"},
		{400, "POST", "/products", `null`, "object"},
		{400, "POST", "/products", `{"name":"a","price":1} {}`, "JSON"},
		{400, "POST", "/products", `{"name":"a","price":1,}`, "JSON"},
		{400, "POST", "/products", `{"name":"a","price":1,"colour":"red"}`, "colour"},
		{400, "POST", "/products", `{"Name":"a","price":1}`, "Name"},
		{400, "POST", "/products", `{"name":1,"price":1}`, "name"},
		{400, "POST", "/products", `{"name":"a","price":"1"}`, "price"},
		{400, "POST", "/products", `{"name":"a","price":null}`, "price"},
		{400, "PUT", path, `{"name":null}`, "name"},
		{400, "POST", "/products", `{"name":"a","price":NaN}`, "JSON"},
		{400, "POST", "/products", `{"name":"a\u0000","price":1}`, "NUL"},
		{400, "POST", "/products", "{\"name\":\"a\x00\",\"price\":1}", "JSON"},
		{400, "POST", "/products", "{\"name\":\"\xff\",\"price\":1}", "UTF-8"},
		{400, "PUT", path, `{"category":"\u0000"}`, "NUL"},
		{413, "POST", "/products", `{"name":"` + strings.Repeat("a", 1<<20) + `","price":1}`, "1 MiB"},
		{422, "POST", "/products", `{}`, `"price":"is required"`},
		{422, "PUT", path, `{}`, "no field"},
		{422, "PUT", path, `{"name":" "}`, `"name":`},
		{422, "PUT", path, `{"name":"` + long(201) + `"}`, `"name":`},
		{422, "PUT", path, `{"stock":-1,"description":"` + long(2001) + `","category":"` + long(101) + `"}`, `{"category":"must have at most 100 characters","description":"must have at most 2000 characters","stock":`},
		{404, "PUT", "/products/999999", `{"stock":1}`, "999999"},
		{404, "GET", "/products/", "", "endpoint"},
		{404, "GET", "/nothing", "", "endpoint"},
		{405, "PATCH", path, "", "endpoint"},
		{405, "POST", "/health", "", "endpoint"},
		{400, "GET", "/products?colour=red", "", "colour"},
		{400, "GET", "/products?category=a;b", "", "malformed"},
		{400, "GET", "/products?%zz", "", "malformed"},
	} {
		refuse(c.status, c.method, c.path, c.body, c.says)
	}
	for rule, prices := range map[string]string{
		`"price":"must be a number from 0 to 99999999.99 with at most 2 decimals"`: `-0.01 0.001 100000000 1e2 1.500E+1 0.300 -0 1e400 ` + strings.Repeat("9", 1000),
		`"stock":"must be a whole number from 0 to 2147483647"`:                    `-1 1.5 1.0 1e2 2147483648 9223372036854775808`,
	} {
		for _, number := range strings.Fields(prices) {
			refuse(422, "PUT", path, `{`+rule[:8]+number+`}`, rule)
		}
	}
	for parameter, values := range map[string]string{"limit": "0 1001 x +1 01", "after": "-1 0 x", "category": "%00 %ff " + strings.Repeat("a", 101)} {
		for _, value := range strings.Fields(values) {
			refuse(400, "GET", "/products?"+parameter+"="+value, "", parameter)
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
	// Of several faults it is always the same one that is told.
	const faults = "/products?limit=0&after=x&category=%00&colour=red&size=1"
	first := s.want(400, "GET", faults, "").body
	for range 50 {
		if body := s.want(400, "GET", faults, "").body; body != first {
			t.Fatalf("%s after %s", body, first)
		}
	}
}

// rows is all that PostgreSQL has, as text.
func rows(t *testing.T, db *sql.DB) (text string) {
	if err := db.QueryRow(`SELECT coalesce(string_agg(p::text, ' ' ORDER BY id), '') FROM products p`).Scan(&text); err != nil {
		t.Error(err)
	}
	return text
}

// TestAccepted sends what is unusual but right.
func TestAccepted(t *testing.T) {
	s := startAlone(t)
	for _, c := range []struct{ body, want string }{
		{`{"name":"a","price":0.10}`, `"price":0.10,`},
		{`{"name":"a","price":99999999.99}`, `"price":99999999.99,`},
		{`{"name":"a","price":0}`, `"price":0.00,`},
		{`{"name":"a","price":12}`, `"price":12.00,`},
		{`{"name":"a","price":12.5}`, `"price":12.50,`},
		{`{"name":"a","name":"b","price":1}`, `"name":"b",`},
		{`{"name":"\ud800","price":1}`, "\"name\":\"\uFFFD\","},
		{`{"name":"a","price":1,"stock":2147483647}`, `"stock":2147483647,`},
		{`{"name":"a","price":1}`, `"description":"","price":1.00,"stock":0,"category":"",`},
		{`{"name":"\ud83d\ude00 \\ud800 ' \" $1 ; --","price":1}`, `"name":"😀 \\ud800 ' \" $1 ; --",`},
		{`{"name":"` + strings.Repeat("é", 200) + `","price":1}`, `"name":"` + strings.Repeat("é", 200) + `",`},
		{"\n {\"name\" : \"\uFFFD\", \"price\":1} \n", "\"name\":\"\uFFFD\","},
	} {
		a := s.want(201, "POST", "/products", c.body)
		if !strings.Contains(a.body, c.want) {
			t.Errorf("%s became %s", c.body, a.body)
		}
		if read := s.send("GET", a.header.Get("Location"), "").body; read != a.body {
			t.Errorf("created %s, read %s", a.body, read)
		}
	}
	s.want(201, "POST", "/products", `{"name":"a","price":1}`, "Content-Type", "application/json; charset=utf-8")
	s.want(201, "POST", "/products", `{"name":"a","price":1}`, "Sec-Fetch-Site", "same-origin")
	s.want(200, "HEAD", "/products", "")
}

// TestPages walks through a category page by page and must meet every product of it once.
func TestPages(t *testing.T) {
	s := startAlone(t)
	mustExec(t, s.db, `INSERT INTO products (name, price, category) SELECT 'p' || n, n, CASE n % 2 WHEN 0 THEN 'a&b' ELSE '' END FROM generate_series(1, 25) n`)
	for _, c := range []struct {
		first string
		want  []int // products a page
	}{
		{"/products?limit=10", []int{10, 10, 5}},
		{"/products?limit=25", []int{25}},
		{"/products?category=a%26b&limit=5", []int{5, 5, 2}},
		{"/products?category=", []int{13}},
		{"/products?category=none", []int{0}},
		{"/products?after=20", []int{5}},
	} {
		last, path := int64(0), c.first
		for i, want := range c.want {
			var list struct {
				Count    int
				Products []product
				Next     string
			}
			a := s.want(200, "GET", path, "")
			if a.source() != "" {
				t.Errorf("%s says %s", path, a.source())
			}
			check(json.Unmarshal([]byte(a.body), &list))
			if list.Count != want || len(list.Products) != want || (list.Next == "") != (i == len(c.want)-1) {
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
}

// TestStats counts what was asked.
func TestStats(t *testing.T) {
	s := startAlone(t)
	s.create(`{"name":"a","price":0.10,"stock":3,"category":"x"}`)
	s.create(`{"name":"b","price":99999999.99,"stock":2147483647,"category":"y"}`)
	s.wantSource(miss, "/products")
	s.wantSource(hit, "/products")
	s.wantSource(hit, "/products")
	body := s.want(200, "GET", "/stats", "").body
	for _, want := range []string{
		`"status":"connected","trusted":true,"hits":2,"misses":1,"bypasses":0,"hit_rate":0.667,"keys":1,"ttl_seconds":300,"memory_used":"`,
		// The value is exact, where a float would have lost the cents.
		`"products":2,"total_stock":2147483650,"inventory_value":214748364678525163.83,"products_per_category":{"x":1,"y":1}`,
		fmt.Sprintf(`"max":%d,`, poolSize()),
	} {
		if !strings.Contains(body, want) {
			t.Errorf("no %s in %s", want, body)
		}
	}
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
	if list := s.want(200, "GET", "/", "").body; strings.Count(list, `":"`) != 2+len(s.endpoints()) {
		t.Errorf("not all endpoints: %s", list)
	}
}

// FuzzDecode checks that a body that is accepted is one that PostgreSQL will take, and that none crashes the decoder.
func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"name":"a","description":"\ud83d\ude00","price":1e2,"stock":3,"category":""}`))
	f.Add([]byte(`{"name":"\\ud800","price":99999999.99}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		in, err := decodeFields(body)
		if err == nil {
			err = in.check(true)
		}
		if err != nil {
			if p, ok := err.(*problem); !ok || p.Status != http.StatusBadRequest && p.Status != http.StatusUnprocessableEntity {
				t.Fatalf("%q: %v is not a problem", body, err)
			}
			return
		}
		if !json.Valid(body) {
			t.Fatalf("accepted %q", body)
		}
		var plain struct{ Name string }
		if err := json.Unmarshal(body, &plain); err != nil || strings.TrimSpace(plain.Name) != *in["name"] || strings.Contains(plain.Name, "\x00") {
			t.Fatalf("%q became %q, not %q: %v", body, *in["name"], plain.Name, err)
		}
		if !regexp.MustCompile(`^\d{1,8}(\.\d{1,2})?$`).MatchString(*in["price"]) {
			t.Fatalf("the price of %q became %s", body, *in["price"])
		}
	})
}

// FuzzQuery checks that what is accepted as an id or a page is what is written back.
func FuzzQuery(f *testing.F) {
	f.Add("category=a%26b&limit=5&after=12")
	f.Add("9223372036854775807")
	f.Fuzz(func(t *testing.T, text string) {
		if id, ok := parseID(text); ok && fmt.Sprint(id) != text {
			t.Fatalf("%q is the id %d", text, id)
		}
		p, err := parsePage(text)
		if err != nil {
			return
		}
		_, query, _ := strings.Cut(p.next(max(p.after, 1)), "?")
		again, err := parsePage(query)
		if err != nil || again.limit != p.limit || (again.category == nil) != (p.category == nil) || p.category != nil && *again.category != *p.category {
			t.Fatalf("%q leads to %q: %v", text, query, err)
		}
	})
}
