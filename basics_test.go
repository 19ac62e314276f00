package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"testing"
)

// The tests in this file need no server. Go runs the files in the order of their names, so that these tests are first,
// and alone with go test -short: there TestMain takes what is called TestUnit... or Fuzz...

// TestUnitSettings sets variables to what the service must refuse. The error names the variable in one line, and never
// contains a password.
func TestUnitSettings(t *testing.T) {
	for _, c := range []struct{ name, value, says string }{
		{"PORT", "http", "from 1 to 65535"}, {"PORT", "70000", "from 1 to 65535"}, {"POSTGRES_PORT", "-1", "from 1 to 65535"},
		{"REDIS_PORT", "6379x", "from 1 to 65535"}, {"CACHE_TTL", "0", "from 1 to 86400"}, {"CACHE_TTL", "5m", "from 1 to 86400"},
		{"POSTGRES_SSLMODE", "maybe", "verify-full"}, {"LOG_LEVEL", "loud", "debug, info, warn, error"},
		{"POSTGRES_HOST", "bad host", "bad host"}, {"POSTGRES_HOST", "[::1", "[::1"},
		{"POSTGRES_PASSWORD_FILE", "/dev/null", "POSTGRES_PASSWORD"}, {"REDIS_PASSWORD_FILE", "/nowhere", "/nowhere"},
	} {
		environment := map[string]string{"POSTGRES_PASSWORD": "hush", c.name: c.value}
		_, err := configure(func(name string) string { return environment[name] })
		if text := fmt.Sprint(err); !strings.Contains(text, c.name) || !strings.Contains(text, c.says) || strings.ContainsAny(text, "\n") || strings.Contains(text, "hush") {
			t.Errorf("%s=%s: %s", c.name, c.value, text)
		}
	}
}

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
			if p, ok := errors.AsType[*problem](err); !ok || p.Status != http.StatusBadRequest || !strings.Contains(p.Detail, says) {
				t.Errorf("%s: %v, and not %q", query, err, says)
			}
		}
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
		if p, ok := errors.AsType[*problem](err); ok && (p.Status == http.StatusBadRequest || p.Status == http.StatusUnprocessableEntity) {
			return
		}
		var plain struct{ Name string }
		if err := cmp.Or(err, json.Unmarshal(body, &plain)); err != nil || strings.TrimSpace(plain.Name) != in.Name.String || strings.Contains(plain.Name, "\x00") {
			t.Fatalf("%q became %q: %v", body, plain.Name, err)
		}
		if !regexp.MustCompile(`^\d{1,8}(\.\d{1,2})?$`).MatchString(in.Price.String) {
			t.Fatalf("the price of %q became %s", body, in.Price.String)
		}
	})
}
