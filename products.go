package main

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"mime"
	"net"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/lib/pq"
)

// A product is as the API shows it. Its price is a json.Number, which is the digits that PostgreSQL sends for a NUMERIC: a
// float would turn 0.10 into 0.1000000000000000055.
type product struct {
	ID          int64       `json:"id"`
	Name        string      `json:"name"`
	Description string      `json:"description"`
	Price       json.Number `json:"price"`
	Stock       int64       `json:"stock"`
	Category    string      `json:"category"`
	CreatedAt   time.Time   `json:"created_at"`
	UpdatedAt   time.Time   `json:"updated_at"`
}

// scan fills p from a row of the columns in the order that every statement below names them.
func (p *product) scan(row interface{ Scan(...any) error }) error {
	return row.Scan(&p.ID, &p.Name, &p.Description, &p.Price, &p.Stock, &p.Category, &p.CreatedAt, &p.UpdatedAt)
}

// A productList is a list as the API shows it: all products, or a page of them. Next is the path of the next page.
type productList struct {
	Count    int       `json:"count"`
	Products []product `json:"products"`
	Next     string    `json:"next,omitempty"`
}

// selectProducts is for the whole list, too: LIMIT NULL is no limit.
const selectProducts = `
SELECT id, name, description, price, stock, category, created_at, updated_at
FROM products
WHERE id > $1
ORDER BY id
LIMIT $2`

// selectCategory is a statement of its own, because with "category = $3 OR $3 IS NULL" in the one above PostgreSQL could
// not use the index of the categories.
const selectCategory = `
SELECT id, name, description, price, stock, category, created_at, updated_at
FROM products
WHERE id > $1 AND category = $3
ORDER BY id
LIMIT $2`

// queryProducts runs one of the two statements above.
func (s *server) queryProducts(ctx context.Context, query string, args ...any) (productList, error) {
	list := productList{Products: []product{}}
	rows, err := s.db.QueryContext(ctx, query, args...)
	if err != nil {
		return list, err
	}
	defer rows.Close()
	for rows.Next() {
		var p product
		if err := p.scan(rows); err != nil {
			return list, err
		}
		list.Products = append(list.Products, p)
	}
	list.Count = len(list.Products)
	return list, rows.Err()
}

// listProducts answers GET /products: the whole list from the cache, or a page from PostgreSQL.
func (s *server) listProducts(w http.ResponseWriter, r *http.Request) error {
	if r.URL.RawQuery != "" {
		return s.listPage(w, r)
	}
	return s.respondCached(w, r, keyAll, func(ctx context.Context) ([]byte, error) {
		list, err := s.queryProducts(ctx, selectProducts, 0, nil)
		if err != nil {
			return nil, err
		}
		return encode(list)
	})
}

// maxPage is how many products a page may have, and has where limit is not given.
const maxPage = 1000

// A page is what a query string asks for: products after an id, of all categories or of one. This is keyset pagination:
// "after the last id that you have seen" finds its place by the index, however far it is, and is right while others
// create and delete products. OFFSET is neither.
type page struct {
	after, limit int64
	category     *string
}

// parsePage reads a query string. The parameters are checked in a fixed order, so that the same request always gets the
// same error. The error is a problem.
func parsePage(rawQuery string) (page, error) {
	p := page{limit: maxPage}
	query, err := url.ParseQuery(rawQuery)
	if err != nil {
		return p, badRequest("the query string is malformed")
	}
	for _, name := range slices.Sorted(maps.Keys(query)) {
		value := query.Get(name)
		ok, rule := true, ""
		switch name {
		case "category":
			p.category, rule = &value, "text of at most 100 characters"
			ok = utf8.ValidString(value) && !strings.Contains(value, "\x00") && utf8.RuneCountInString(value) <= 100
		case "limit":
			rule = fmt.Sprintf("a number from 1 to %d", maxPage)
			p.limit, ok = parseID(value)
			ok = ok && p.limit <= maxPage
		case "after":
			rule = "an id"
			p.after, ok = parseID(value)
		default:
			return p, badRequest("%s is not a parameter: category, limit and after are", name)
		}
		if len(query[name]) > 1 {
			return p, badRequest("%s is given more than once", name)
		}
		if !ok {
			return p, badRequest("%s must be %s", name, rule)
		}
	}
	return p, nil
}

// next returns the path of the page that begins after an id.
func (p *page) next(after int64) string {
	query := url.Values{"limit": {strconv.FormatInt(p.limit, 10)}, "after": {strconv.FormatInt(after, 10)}}
	if p.category != nil {
		query.Set("category", *p.category)
	}
	return "/products?" + query.Encode()
}

// listPage answers GET /products with a query string. Pages are not cached: there are too many different ones, and each
// write would have to delete them all.
func (s *server) listPage(w http.ResponseWriter, r *http.Request) error {
	p, err := parsePage(r.URL.RawQuery)
	if err != nil {
		return err
	}
	// One row more than asked for tells whether there is a next page.
	query, args := selectProducts, []any{p.after, p.limit + 1}
	if p.category != nil {
		query, args = selectCategory, append(args, *p.category)
	}
	ctx, cancel := context.WithTimeout(r.Context(), queryTimeout)
	defer cancel()
	list, err := s.queryProducts(ctx, query, args...)
	if err != nil {
		return err
	}
	if list.Count > int(p.limit) {
		list.Count, list.Products = int(p.limit), list.Products[:p.limit]
		list.Next = p.next(list.Products[p.limit-1].ID)
	}
	return respondJSON(w, http.StatusOK, list)
}

// ---------------------------------------------------------------- one product

const selectProduct = `
SELECT id, name, description, price, stock, category, created_at, updated_at
FROM products
WHERE id = $1`

// getProduct answers GET /products/{id}, from the cache.
func (s *server) getProduct(w http.ResponseWriter, r *http.Request) error {
	id, ok := parseID(r.PathValue("id"))
	if !ok {
		return sql.ErrNoRows
	}
	return s.respondCached(w, r, productKey(id), func(ctx context.Context) ([]byte, error) {
		var p product
		if err := p.scan(s.db.QueryRowContext(ctx, selectProduct, id)); err != nil {
			return nil, err
		}
		return encode(&p)
	})
}

// respondCached answers with the body of key and says where it came from. The body is the same bytes, whether it was
// cached or not.
func (s *server) respondCached(w http.ResponseWriter, r *http.Request, key string, load func(context.Context) ([]byte, error)) error {
	body, from, err := s.cache.Get(r.Context(), key, load)
	w.Header().Set("Cache-Status", string(from))
	if err != nil {
		return err
	}
	respond(w, http.StatusOK, "application/json", body)
	return nil
}

// In this statement and the next, NULL stands for a field that was not sent. The casts are there because a number comes as
// its digits: PostgreSQL turns them into a number, exactly.
const insertProduct = `
INSERT INTO products (name, description, price, stock, category)
VALUES ($1, coalesce($2, ''), $3::numeric, coalesce($4::integer, 0), coalesce($5, ''))
RETURNING id, name, description, price, stock, category, created_at, updated_at`

// createProduct answers POST /products. The new product can be in no cache yet, but the list can.
func (s *server) createProduct(w http.ResponseWriter, r *http.Request) error {
	f, err := readFields(w, r, true)
	if err != nil {
		return err
	}
	var p product
	err = s.cache.Write(r.Context(), []string{keyAll}, func(ctx context.Context, conn *sql.Conn) error {
		return p.scan(conn.QueryRowContext(ctx, insertProduct, f["name"], f["description"], f["price"], f["stock"], f["category"]))
	})
	if err != nil {
		return err
	}
	w.Header().Set("Location", "/products/"+strconv.FormatInt(p.ID, 10))
	return respondJSON(w, http.StatusCreated, &p)
}

const updateProduct = `
UPDATE products
SET name        = coalesce($2, name),
    description = coalesce($3, description),
    price       = coalesce($4::numeric, price),
    stock       = coalesce($5::integer, stock),
    category    = coalesce($6, category),
    updated_at  = clock_timestamp() -- now() is when the statement began, maybe long before it got the row's lock
WHERE id = $1
RETURNING id, name, description, price, stock, category, created_at, updated_at`

// updateProduct answers PUT /products/{id}. It is one statement: to read the row first and to write it back would lose
// what somebody else changed in between.
func (s *server) updateProduct(w http.ResponseWriter, r *http.Request) error {
	id, ok := parseID(r.PathValue("id"))
	if !ok {
		return sql.ErrNoRows
	}
	f, err := readFields(w, r, false)
	if err != nil {
		return err
	}
	var p product
	err = s.cache.Write(r.Context(), []string{keyAll, productKey(id)}, func(ctx context.Context, conn *sql.Conn) error {
		return p.scan(conn.QueryRowContext(ctx, updateProduct, id, f["name"], f["description"], f["price"], f["stock"], f["category"]))
	})
	if err != nil {
		return err
	}
	return respondJSON(w, http.StatusOK, &p)
}

const deleteProduct = `
DELETE FROM products
WHERE id = $1
RETURNING id`

// deleteProduct answers DELETE /products/{id}.
func (s *server) deleteProduct(w http.ResponseWriter, r *http.Request) error {
	id, ok := parseID(r.PathValue("id"))
	if !ok {
		return sql.ErrNoRows
	}
	err := s.cache.Write(r.Context(), []string{keyAll, productKey(id)}, func(ctx context.Context, conn *sql.Conn) error {
		var deleted int64
		return conn.QueryRowContext(ctx, deleteProduct, id).Scan(&deleted)
	})
	if err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// clearCache answers DELETE /cache/clear. It deletes this service's keys only: others may use the same Redis.
func (s *server) clearCache(w http.ResponseWriter, r *http.Request) error {
	cleared, err := s.cache.Clear()
	if err != nil {
		return &problem{Status: http.StatusServiceUnavailable, Detail: "cache unavailable"}
	}
	return respondJSON(w, http.StatusOK, map[string]int{"cleared": cleared})
}

// productKey is the key under which a product is cached.
func productKey(id int64) string { return keyPrefix + strconv.FormatInt(id, 10) }

// parseID accepts a positive 64-bit integer, written in the one way in which the API writes it.
func parseID(text string) (int64, bool) {
	id, err := strconv.ParseInt(text, 10, 64)
	return id, err == nil && id > 0 && strconv.FormatInt(id, 10) == text
}

// fields are what a body sets, by name: a text, or a number's digits as they were sent. A field that was not sent is nil,
// which is NULL in a statement.
type fields map[string]*string

// A rule is what a field must be. A value of the wrong type is a 400, since the body cannot be understood; one that breaks
// the rule is a 422, which names the field and says the rule.
type rule struct {
	number, required bool // required when a product is created
	valid            func(string) bool
	says             string
}

// A price stays digits from the body to PostgreSQL, so it is exact.
var rules = map[string]rule{
	"name":        {required: true, valid: hasLength(1, 200), says: "must have from 1 to 200 characters"},
	"description": {valid: hasLength(0, 2000), says: "must have at most 2000 characters"},
	"category":    {valid: hasLength(0, 100), says: "must have at most 100 characters"},
	"price": {number: true, required: true, valid: regexp.MustCompile(`^[0-9]{1,8}(\.[0-9]{1,2})?$`).MatchString,
		says: "must be a number from 0 to 99999999.99 with at most 2 decimals"},
	"stock": {number: true, valid: isStock, says: "must be a whole number from 0 to 2147483647"},
}

// hasLength returns a function that reports whether a text has from min to max characters.
func hasLength(min, max int) func(string) bool {
	return func(text string) bool {
		n := utf8.RuneCountInString(text)
		return n >= min && n <= max
	}
}

// isStock reports whether digits are a whole number that PostgreSQL's type integer can hold.
func isStock(digits string) bool {
	_, err := strconv.ParseUint(digits, 10, 31)
	return err == nil
}

// maxBody is how many bytes a request's body may have.
const maxBody = 1 << 20

// readFields reads, decodes and checks a request's body, which must be JSON. The error is a problem.
func readFields(w http.ResponseWriter, r *http.Request, creating bool) (fields, error) {
	if mediaType, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || mediaType != "application/json" {
		return nil, &problem{Status: http.StatusUnsupportedMediaType, Detail: "send Content-Type: application/json"}
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if _, large := errors.AsType[*http.MaxBytesError](err); large {
		return nil, &problem{Status: http.StatusRequestEntityTooLarge, Detail: "the body is larger than 1 MiB"}
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil, &problem{Status: http.StatusRequestTimeout, Detail: "the body took too long to arrive"}
	}
	if err != nil {
		return nil, badRequest("the body could not be read")
	}
	f, err := decodeFields(body)
	if err == nil {
		err = f.check(creating)
	}
	return f, err
}

// decodeFields decodes a body, which must be one JSON object. Unlike encoding/json by itself, it takes a name only as it is
// written, and neither an unknown one nor null. Names are looked at in their order, so that the same body always gets
// the same error. The error is a problem.
func decodeFields(body []byte) (fields, error) {
	if !utf8.Valid(body) {
		return nil, badRequest("the body is not valid UTF-8")
	}
	var sent map[string]json.RawMessage
	if err := json.Unmarshal(body, &sent); err != nil || sent == nil {
		return nil, badRequest("the body must be one JSON object")
	}
	f := fields{}
	for _, name := range slices.Sorted(maps.Keys(sent)) {
		rule, known := rules[name]
		value := string(sent[name])
		switch first := value[0]; {
		case !known:
			return nil, badRequest("%q is not a field", name)
		case rule.number && first != '-' && (first < '0' || first > '9'):
			return nil, badRequest("%s must be a number", name)
		case !rule.number && first != '"':
			return nil, badRequest("%s must be a string", name)
		case !rule.number:
			if err := json.Unmarshal(sent[name], &value); err != nil || strings.Contains(value, "\x00") {
				return nil, badRequest("%s contains a NUL, which PostgreSQL cannot store", name)
			}
		}
		f[name] = &value
	}
	return f, nil
}

// check trims the name and holds the fields against their rules. The error is a problem that names every field at fault.
func (f fields) check(creating bool) error {
	if name := f["name"]; name != nil {
		*name = strings.TrimSpace(*name)
	}
	faults := map[string]string{}
	for name, rule := range rules {
		if value := f[name]; value != nil && !rule.valid(*value) {
			faults[name] = rule.says
		} else if value == nil && rule.required && creating {
			faults[name] = "is required"
		}
	}
	if len(faults) > 0 {
		return &problem{Status: http.StatusUnprocessableEntity, Detail: "some fields are not valid", Errors: faults}
	}
	if len(f) == 0 {
		return &problem{Status: http.StatusUnprocessableEntity, Detail: "no field to change was sent"}
	}
	return nil
}

// ---------------------------------------------------------------- statements

// errTooLate says that a statement was not sent because it was too late for it.
var errTooLate = errors.New("too late to send the statement")

// errNotConnected says that there is no connection to PostgreSQL. The reason is only text in it: lib/pq hides the kind of
// some, and they all mean the same here.
var errNotConnected = errors.New("could not connect to PostgreSQL")

// sendBefore is the key under which a context says until when a statement may be sent. Unlike a context's own deadline
// it does not end a statement that has been sent.
type sendBefore struct{}

// A preparer makes connections that prepare each query when they get it for the first time, so that PostgreSQL parses and
// plans it once and not for every request. All queries are constants, so there are only a few.
type preparer struct{ driver.Connector }

func (p preparer) Connect(ctx context.Context) (driver.Conn, error) {
	conn, err := p.Connector.Connect(ctx)
	if err != nil {
		return nil, fmt.Errorf("%w: %v", errNotConnected, err)
	}
	return &preparingConn{conn.(pqConn), map[string]driver.Stmt{}}, nil
}

// A pqConn is all that database/sql uses of a connection.
type pqConn interface {
	driver.Conn
	driver.ConnPrepareContext
	driver.ExecerContext
	driver.SessionResetter
	driver.Validator
}

// A preparingConn is a connection of a preparer.
type preparingConn struct {
	pqConn
	prepared map[string]driver.Stmt
}

// QueryContext sends a query unless it is too late by the context's sendBefore: then the error is errTooLate. Once it is
// sent the context does not end it. Only statement_timeout does, at which PostgreSQL says that it has not made the
// change; lib/pq would break the connection off instead, and nobody would know.
func (c *preparingConn) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	stmt := c.prepared[query]
	if stmt == nil {
		var err error
		if stmt, err = c.PrepareContext(ctx, query); err != nil {
			return nil, err
		}
		c.prepared[query] = stmt
	}
	if deadline, ok := ctx.Value(sendBefore{}).(time.Time); ok && time.Now().After(deadline) {
		return nil, errTooLate
	}
	rows, err := stmt.(driver.StmtQueryContext).QueryContext(context.WithoutCancel(ctx), args)
	if e := pq.As(err); e != nil && e.Code == "0A000" { // the table was altered, and the statement not run
		return nil, driver.ErrBadConn
	}
	return rows, err
}

// unavailable reports whether the error of a statement means that PostgreSQL cannot be used now, rather than that the
// statement is wrong.
func unavailable(err error) bool {
	if e := pq.As(err); e != nil {
		// Connection exceptions, out of resources, and an operator's intervention, which covers shutting down, starting
		// up and a statement that took too long; and the schema not applied yet.
		return slices.Contains([]string{"08", "53", "57"}, string(e.Code.Class())) || e.Code == "42P01"
	}
	_, network := errors.AsType[net.Error](err)
	return network || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, errTooLate) || errors.Is(err, errNotConnected) ||
		errors.Is(err, driver.ErrBadConn) || errors.Is(err, sql.ErrConnDone) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
}

// outcomeUnknown reports whether a statement that ended with err may have been committed, or may yet be: when
// PostgreSQL did not say that it refused it, but the connection was lost or nothing came back in time. The writer's
// marks then stay until they expire, which is after the last moment at which it can be committed.
func outcomeUnknown(err error) bool {
	if err == nil || errors.Is(err, sql.ErrNoRows) || errors.Is(err, errTooLate) {
		return false
	}
	refusal := pq.As(err)
	return refusal == nil || refusal.Fatal()
}
