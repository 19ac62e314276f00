package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
)

// TestProducts goes through the life of a product, and through every endpoint that serves it.
func TestProducts(t *testing.T) {
	s := startServer(t, withDatabase(t, testConfig(t)))
	if got, want := s.wantSource(miss, "/products"), `{"count":0,"products":[]}`+"\n"; got != want {
		t.Errorf("the empty list is %q", got)
	}
	a := s.want(201, "POST", "/products", `{"name":"  Café <1>  ","description":"d","price":99.9,"stock":100,"category":"livros"}`)
	var p product
	if err := json.Unmarshal([]byte(a.body), &p); err != nil {
		t.Fatal(err)
	}
	path := fmt.Sprintf("/products/%d", p.ID)
	if a.header.Get("Location") != path {
		t.Errorf("Location is %q, want %q", a.header.Get("Location"), path)
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
	s := startServer(t, withDatabase(t, testConfig(t)))
	p := s.create(`{"name":"a","price":1}`)
	path := fmt.Sprintf("/products/%d", p.ID)
	before := s.send("GET", "/products", "").body
	long := func(n int) string { return strings.Repeat("é", n) }
	for _, c := range []struct {
		status             int
		method, path, body string
		says               string
	}{
		{400, "POST", "/products", `{"name":"a","price":1`, "JSON"},
		{400, "POST", "/products", `["a"]`, "object"},
		{400, "POST", "/products", `null`, "object"},
		{400, "POST", "/products", `{"name":"a","price":1} {}`, "more than one"},
		{400, "POST", "/products", `{"name":"a","price":1,}`, "JSON"},
		{400, "POST", "/products", `{"name":"a","price":1,"colour":"red"}`, "colour"},
		{400, "POST", "/products", `{"Name":"a","price":1}`, "Name"},
		{400, "POST", "/products", `{"name":"a","name":"b","price":1}`, "twice"},
		{400, "POST", "/products", `{"name":1,"price":1}`, "name must be a string"},
		{400, "POST", "/products", `{"name":"a","price":"1"}`, "price must be a number"},
		{400, "POST", "/products", `{"name":"a","price":null}`, "price must be a number"},
		{400, "PUT", path, `{"name":null}`, "name must be a string"},
		{400, "POST", "/products", `{"name":"a","price":NaN}`, "JSON"},
		{400, "POST", "/products", `{"name":"a\u0000","price":1}`, "NUL"},
		{400, "POST", "/products", "{\"name\":\"a\x00\",\"price\":1}", "JSON"},
		{400, "POST", "/products", "{\"name\":\"\xff\",\"price\":1}", "UTF-8"},
		{400, "POST", "/products", `{"name":"\ud800","price":1}`, "surrogate"},
		{400, "POST", "/products", `{"name":"\udc00\ud800","price":1}`, "surrogate"},
		{400, "PUT", path, `{"category":"\ud800x"}`, "surrogate"},
		{413, "POST", "/products", `{"name":"` + strings.Repeat("a", 1<<20) + `","price":1}`, "1 MiB"},
		{422, "POST", "/products", `{}`, `"price":"is required"`},
		{422, "PUT", path, `{}`, "no field"},
		{422, "POST", "/products", `{"name":" ","price":1}`, `"name":`},
		{422, "POST", "/products", `{"name":"` + long(201) + `","price":1}`, `"name":`},
		{422, "POST", "/products", `{"name":"a","price":-0.01}`, `"price":"must be a number from 0 to 99999999.99 with at most 2 decimals"`},
		{422, "POST", "/products", `{"name":"a","price":0.001}`, `"price":`},
		{422, "POST", "/products", `{"name":"a","price":100000000}`, `"price":`},
		{422, "POST", "/products", `{"name":"a","price":1e400}`, `"price":`},
		{422, "POST", "/products", `{"name":"a","price":1e999999999999}`, `"price":`},
		{422, "POST", "/products", `{"name":"a","price":1,"stock":1.5}`, `"stock":`},
		{422, "POST", "/products", `{"name":"a","price":1,"stock":2147483648}`, `"stock":`},
		{422, "PUT", path, `{"stock":-1,"description":"` + long(2001) + `","category":"` + long(101) + `"}`, `{"category":"must have at most 100 characters","description":"must have at most 2000 characters","stock":`},
		{404, "PUT", "/products/999999", `{"stock":1}`, "999999"},
		{404, "GET", "/products/0", "", "does not exist"},
		{404, "GET", "/products/-1", "", "does not exist"},
		{404, "GET", "/products/+1", "", "does not exist"},
		{404, "GET", "/products/01", "", "does not exist"},
		{404, "GET", "/products/1.0", "", "does not exist"},
		{404, "GET", "/products/9223372036854775808", "", "does not exist"},
		{404, "DELETE", "/products/x", "", "does not exist"},
		{404, "PUT", "/products/%00", `{"stock":1}`, "does not exist"},
		{404, "GET", "/products/", "", "endpoint"},
		{404, "GET", "/nothing", "", "endpoint"},
		{405, "PATCH", path, "", "endpoint"},
		{405, "POST", "/health", "", "endpoint"},
		{400, "GET", "/products?colour=red", "", "colour"},
		{400, "GET", "/products?limit=0", "", "limit"},
		{400, "GET", "/products?limit=1001", "", "limit"},
		{400, "GET", "/products?limit=x", "", "limit"},
		{400, "GET", "/products?limit=+1", "", "limit"},
		{400, "GET", "/products?limit=1&limit=1", "", "more than once"},
		{400, "GET", "/products?after=-1", "", "after"},
		{400, "GET", "/products?after=", "", "after"},
		{400, "GET", "/products?category=%00", "", "category"},
		{400, "GET", "/products?category=%ff", "", "category"},
		{400, "GET", "/products?category=a;b", "", "malformed"},
		{400, "GET", "/products?%zz", "", "malformed"},
	} {
		name := fmt.Sprintf("%s %s %.60s", c.method, c.path, c.body)
		t.Run(name, func(t *testing.T) {
			s := &testServer{s.server, t, s.url}
			a := s.want(c.status, c.method, c.path, c.body)
			if !strings.Contains(strings.ReplaceAll(a.body, `\"`, `"`), c.says) {
				t.Errorf("the error does not say %q: %s", c.says, a.body)
			}
			if c.status == 405 && a.header.Get("Allow") == "" {
				t.Error("405 without Allow")
			}
			if after := s.send("GET", "/products", "").body; after != before {
				t.Errorf("something was changed: %s", after)
			}
		})
	}
	s.want(415, "POST", "/products", `{"name":"a","price":1}`, "Content-Type", "text/plain")
	s.want(415, "POST", "/products", `{"name":"a","price":1}`, "Content-Type", "")
	s.want(403, "DELETE", path, "", "Sec-Fetch-Site", "cross-site")
	s.want(403, "POST", "/products", `{"name":"a","price":1}`, "Origin", "https://elsewhere.example")
	if after := s.send("GET", "/products", "").body; after != before {
		t.Errorf("something was changed: %s", after)
	}
}

// TestAccepted sends what is unusual but right.
func TestAccepted(t *testing.T) {
	s := startServer(t, withDatabase(t, testConfig(t)))
	for _, c := range []struct{ body, want string }{
		{`{"name":"a","price":0.10}`, `"price":0.10,`},
		{`{"name":"a","price":99999999.99}`, `"price":99999999.99,`},
		{`{"name":"a","price":1e2}`, `"price":100.00,`},
		{`{"name":"a","price":1.500E+1}`, `"price":15.00,`},
		{`{"name":"a","price":0}`, `"price":0.00,`},
		{`{"name":"a","price":0.30000}`, `"price":0.30,`},
		{`{"name":"a","price":1,"stock":2147483647}`, `"stock":2147483647,`},
		{`{"name":"a","price":1,"stock":1e2}`, `"stock":100,`},
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
	s := startServer(t, withDatabase(t, testConfig(t)))
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
			if a.header.Get("Cache-Status") != "" {
				t.Errorf("%s says %s", path, a.header.Get("Cache-Status"))
			}
			if err := json.Unmarshal([]byte(a.body), &list); err != nil {
				t.Fatal(err)
			}
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
	s := startServer(t, withDatabase(t, testConfig(t)))
	s.create(`{"name":"a","price":0.10,"stock":3,"category":"x"}`)
	s.create(`{"name":"b","price":99999999.99,"stock":2147483647,"category":"y"}`)
	s.wantSource(miss, "/products")
	s.wantSource(hit, "/products")
	s.wantSource(hit, "/products")
	var st struct {
		Cache    cacheStats
		Database databaseStats
		Pools    map[string]poolStats
	}
	if err := json.Unmarshal([]byte(s.want(200, "GET", "/stats", "").body), &st); err != nil {
		t.Fatal(err)
	}
	if c := st.Cache; c.Hits != 2 || c.Misses != 1 || c.Bypasses != 0 || c.Keys != 1 || c.TTL != 300 || c.Status != "connected" || !c.Trusted || c.Memory == "" {
		t.Errorf("cache: %+v", c)
	}
	// The value is exact, where a float would have lost the cents.
	if d := st.Database; d.Products != 2 || d.Stock != "2147483650" || d.Value != "214748364678525163.83" || string(d.Categories) != `{"x":1,"y":1}` {
		t.Errorf("database: %+v %s", d, d.Categories)
	}
	if st.Pools["postgres"].Most != poolSize() || st.Pools["redis"].Most != poolSize() {
		t.Errorf("pools: %+v", st.Pools)
	}
}

// TestIndexAndServices checks what a newcomer sees first.
func TestIndexAndServices(t *testing.T) {
	s := startServer(t, withDatabase(t, testConfig(t)))
	var index struct {
		Name, Version string
		Endpoints     map[string]string
	}
	if err := json.Unmarshal([]byte(s.want(200, "GET", "/", "").body), &index); err != nil {
		t.Fatal(err)
	}
	if index.Name != "desafio3" || index.Version == "" || len(index.Endpoints) != len(s.endpoints()) || index.Endpoints["GET /products"] == "" {
		t.Errorf("index: %+v", index)
	}
	var services map[string]map[string]any
	if err := json.Unmarshal([]byte(s.want(200, "GET", "/services", "").body), &services); err != nil {
		t.Fatal(err)
	}
	for name, fields := range map[string][]string{
		"web":      {"status", "address", "version", "latency_ms", "uptime", "hostname", "go"},
		"postgres": {"status", "address", "version", "latency_ms"},
		"redis":    {"status", "address", "version", "latency_ms"},
	} {
		for _, field := range fields {
			if value, ok := services[name][field]; !ok || value == "" {
				t.Errorf("%s has no %s: %v", name, field, services[name])
			}
		}
	}
	if a := s.want(200, "GET", "/health", ""); !strings.HasPrefix(a.body, `{"status":"healthy","database":"connected","cache":"connected","timestamp":"`) {
		t.Errorf("health: %s", a.body)
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
		if err := json.Unmarshal(body, &plain); err != nil || strings.TrimSpace(plain.Name) != *in.Name || strings.Contains(plain.Name, "\x00") {
			t.Fatalf("%q became %q, not %q: %v", body, *in.Name, plain.Name, err)
		}
		if !strings.Contains(string(*in.Price), ".") || strings.ContainsAny(string(*in.Price), "eE-") {
			t.Fatalf("the price of %q became %s", body, *in.Price)
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
