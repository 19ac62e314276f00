package main

import (
	"bytes"
	"context"
	"database/sql"
	"database/sql/driver"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/lib/pq"
)

// A product as the API shows it. Its price is the digits of a NUMERIC, never a float.
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

const selectAll = `
SELECT id, name, description, price, stock, category, created_at, updated_at
FROM products
ORDER BY id`

const selectPage = `
SELECT id, name, description, price, stock, category, created_at, updated_at
FROM products
WHERE id > $1
ORDER BY id
LIMIT $2`

const selectCategoryPage = `
SELECT id, name, description, price, stock, category, created_at, updated_at
FROM products
WHERE id > $1 AND category = $3
ORDER BY id
LIMIT $2`

// listProducts answers GET /products: the whole list from the cache, or a page from PostgreSQL.
func (s *server) listProducts(w http.ResponseWriter, r *http.Request) error {
	if r.URL.RawQuery != "" {
		return s.pageOfProducts(w, r)
	}
	return s.respondCached(w, r, keyAll, func(ctx context.Context) ([]byte, error) {
		rows, err := s.db.QueryContext(ctx, selectAll)
		if err != nil {
			return nil, err
		}
		return encodeList(rows, nil)
	})
}

const maxPage = 1000

// A page is what a query string asks for.
type page struct {
	after    int64
	limit    int
	category *string
}

// parsePage reads a query string. The error is a problem.
func parsePage(rawQuery string) (page, error) {
	p := page{limit: maxPage}
	query, err := url.ParseQuery(rawQuery)
	if err != nil {
		return p, badRequest("the query string is malformed")
	}
	for name, values := range query {
		value := values[0]
		ok, rule := true, ""
		switch name {
		case "category":
			p.category, rule = &value, "text of at most 100 characters"
			ok = utf8.ValidString(value) && !strings.Contains(value, "\x00") && utf8.RuneCountInString(value) <= 100
		case "limit":
			rule = fmt.Sprintf("a number from 1 to %d", maxPage)
			p.limit, err = strconv.Atoi(value)
			ok = err == nil && p.limit >= 1 && p.limit <= maxPage && strconv.Itoa(p.limit) == value
		case "after":
			rule = "an id"
			p.after, ok = parseID(value)
		default:
			return p, badRequest("%s is not a parameter: category, limit and after are", name)
		}
		if len(values) > 1 {
			return p, badRequest("%s is given more than once", name)
		}
		if !ok {
			return p, badRequest("%s must be %s", name, rule)
		}
	}
	return p, nil
}

func (s *server) pageOfProducts(w http.ResponseWriter, r *http.Request) error {
	p, err := parsePage(r.URL.RawQuery)
	if err != nil {
		return err
	}
	// One row more than asked for tells whether there is a next page.
	body, err := within(r.Context(), func(ctx context.Context) ([]byte, error) {
		query, args := selectPage, []any{p.after, p.limit + 1}
		if p.category != nil {
			query, args = selectCategoryPage, append(args, *p.category)
		}
		rows, err := s.db.QueryContext(ctx, query, args...)
		if err != nil {
			return nil, err
		}
		return encodeList(rows, &p)
	})
	if err != nil {
		return err
	}
	respond(w, http.StatusOK, body)
	return nil
}

// next returns the path of the page that begins after an id.
func (p *page) next(after int64) string {
	query := url.Values{"limit": {strconv.Itoa(p.limit)}, "after": {strconv.FormatInt(after, 10)}}
	if p.category != nil {
		query.Set("category", *p.category)
	}
	return "/products?" + query.Encode()
}

// encodeList encodes rows as they come, so that a long list is in memory once, and closes them. Of a page it takes
// no more than the page's limit, and names the next page when there is more.
func encodeList(rows *sql.Rows, page *page) ([]byte, error) {
	defer rows.Close()
	const room = len(`{"count":9223372036854775807,"products":[`)
	buf := bytes.NewBuffer(make([]byte, room, 4096))
	enc := json.NewEncoder(buf)
	enc.SetEscapeHTML(false)
	var p product
	count, next := 0, ""
	for rows.Next() {
		if page != nil && count == page.limit {
			next = page.next(p.ID)
			break
		}
		if err := p.scan(rows); err != nil {
			return nil, err
		}
		if err := enc.Encode(&p); err != nil {
			return nil, err
		}
		buf.Bytes()[buf.Len()-1] = ',' // where Encode has put a new line
		count++
	}
	if err := rows.Err(); err != nil {
		return nil, err
	}
	if count > 0 {
		buf.Truncate(buf.Len() - 1)
	}
	buf.WriteByte(']')
	if next != "" {
		buf.WriteString(`,"next":`)
		if err := enc.Encode(next); err != nil {
			return nil, err
		}
		buf.Truncate(buf.Len() - 1)
	}
	buf.WriteString("}\n")
	// The count is known only now: it goes to the end of the room kept for it.
	head := fmt.Sprintf(`{"count":%d,"products":[`, count)
	body := buf.Bytes()[room-len(head):]
	copy(body, head)
	return body, nil
}

const selectProduct = `
SELECT id, name, description, price, stock, category, created_at, updated_at
FROM products
WHERE id = $1`

func (s *server) getProduct(w http.ResponseWriter, r *http.Request) error {
	id, ok := parseID(r.PathValue("id"))
	if !ok {
		return noSuchProduct(r.PathValue("id"))
	}
	return s.respondCached(w, r, productKey(id), func(ctx context.Context) ([]byte, error) {
		var p product
		if err := p.scan(s.db.QueryRowContext(ctx, selectProduct, id)); err != nil {
			return nil, missing(err, id)
		}
		return encode(&p)
	})
}

// respondCached answers with the body of key and says where it came from.
func (s *server) respondCached(w http.ResponseWriter, r *http.Request, key string, load func(context.Context) ([]byte, error)) error {
	body, from, err := s.cache.Get(r.Context(), key, load)
	if from != "" {
		w.Header().Set("Cache-Status", string(from))
	}
	if err != nil {
		return err
	}
	respond(w, http.StatusOK, body)
	return nil
}

const insertProduct = `
INSERT INTO products (name, description, price, stock, category)
VALUES ($1, coalesce($2, ''), $3::numeric, coalesce($4, 0), coalesce($5, ''))
RETURNING id, name, description, price, stock, category, created_at, updated_at`

func (s *server) createProduct(w http.ResponseWriter, r *http.Request) error {
	f, err := readFields(w, r, true)
	if err != nil {
		return err
	}
	var p product
	err = s.cache.Write(r.Context(), []string{keyAll}, func(ctx context.Context, conn *sql.Conn) error {
		return p.scan(conn.QueryRowContext(ctx, insertProduct, f.Name, f.Description, f.Price, f.Stock, f.Category))
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
    stock       = coalesce($5, stock),
    category    = coalesce($6, category),
    updated_at  = now()
WHERE id = $1
RETURNING id, name, description, price, stock, category, created_at, updated_at`

func (s *server) updateProduct(w http.ResponseWriter, r *http.Request) error {
	id, ok := parseID(r.PathValue("id"))
	if !ok {
		return noSuchProduct(r.PathValue("id"))
	}
	f, err := readFields(w, r, false)
	if err != nil {
		return err
	}
	var p product
	err = s.cache.Write(r.Context(), []string{keyAll, productKey(id)}, func(ctx context.Context, conn *sql.Conn) error {
		return missing(p.scan(conn.QueryRowContext(ctx, updateProduct, id, f.Name, f.Description, f.Price, f.Stock, f.Category)), id)
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

func (s *server) deleteProduct(w http.ResponseWriter, r *http.Request) error {
	id, ok := parseID(r.PathValue("id"))
	if !ok {
		return noSuchProduct(r.PathValue("id"))
	}
	err := s.cache.Write(r.Context(), []string{keyAll, productKey(id)}, func(ctx context.Context, conn *sql.Conn) error {
		var deleted int64
		return missing(conn.QueryRowContext(ctx, deleteProduct, id).Scan(&deleted), id)
	})
	if err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (s *server) clearCache(w http.ResponseWriter, r *http.Request) error {
	cleared, err := s.cache.Clear(r.Context())
	if err != nil {
		return &problem{Status: http.StatusServiceUnavailable, Detail: "cache unavailable"}
	}
	return respondJSON(w, http.StatusOK, map[string]int{"cleared": cleared})
}

func productKey(id int64) string { return keyPrefix + strconv.FormatInt(id, 10) }

// parseID accepts a positive 64-bit integer, written in the one way in which the API writes it.
func parseID(text string) (int64, bool) {
	id, err := strconv.ParseInt(text, 10, 64)
	return id, err == nil && id > 0 && strconv.FormatInt(id, 10) == text
}

func noSuchProduct(id any) error {
	return &problem{Status: http.StatusNotFound, Detail: fmt.Sprintf("product %v does not exist", id)}
}

// missing turns the error of a statement that found no row into a problem.
func missing(err error, id int64) error {
	if errors.Is(err, sql.ErrNoRows) {
		return noSuchProduct(id)
	}
	return err
}

// fields are what a body sets; nil means that it does not. Price and Stock are exact digits once checked.
type fields struct {
	Name, Description, Category *string
	Price, Stock                *json.Number
}

// readFields reads, decodes and checks a request's body. The error is a problem.
func readFields(w http.ResponseWriter, r *http.Request, creating bool) (fields, error) {
	var f fields
	body, err := readBody(w, r)
	if err == nil {
		f, err = decodeFields(body)
	}
	if err == nil {
		err = f.check(creating)
	}
	return f, err
}

// escapes matches a JSON string's escapes, so that the last three alternatives, which encoding/json would replace or
// PostgreSQL refuse, are seen only where they really are escapes: a surrogate without its other half, and NUL.
var escapes = regexp.MustCompile(`\\(?:\\|u[dD][89abAB]..\\u[dD][c-fC-F]..|(u[dD][89abAB]|u[dD][c-fC-F]|u0000))`)

// decodeFields decodes one JSON object. Unlike json.Unmarshal it insists on exact and unrepeated names and on text
// that is Unicode. The error is a problem.
func decodeFields(body []byte) (fields, error) {
	var f fields
	if !utf8.Valid(body) {
		return f, badRequest("the body is not valid UTF-8")
	}
	for _, match := range escapes.FindAllSubmatchIndex(body, -1) {
		if match[2] >= 0 {
			return f, badRequest("the body contains a NUL or half a surrogate pair")
		}
	}
	dec := json.NewDecoder(bytes.NewReader(body))
	if token, err := dec.Token(); err != nil || token != json.Delim('{') {
		return f, badRequest("the body must be a JSON object")
	}
	texts := map[string]**string{"name": &f.Name, "description": &f.Description, "category": &f.Category}
	numbers := map[string]**json.Number{"price": &f.Price, "stock": &f.Stock}
	for dec.More() {
		token, err := dec.Token()
		if err != nil {
			return f, badRequest("the body is not valid JSON")
		}
		name := token.(string)
		var value json.RawMessage
		if err := dec.Decode(&value); err != nil {
			return f, badRequest("the body is not valid JSON")
		}
		if text, ok := texts[name]; ok {
			if value[0] != '"' {
				return f, badRequest("%s must be a string", name)
			}
			err = json.Unmarshal(value, text)
			delete(texts, name)
		} else if number, ok := numbers[name]; ok {
			if value[0] != '-' && (value[0] < '0' || value[0] > '9') {
				return f, badRequest("%s must be a number", name)
			}
			err = json.Unmarshal(value, number)
			delete(numbers, name)
		} else {
			return f, badRequest("%s is not a field, or is given twice", name)
		}
		if err != nil {
			return f, badRequest("the body is not valid JSON")
		}
	}
	if _, err := dec.Token(); err != nil {
		return f, badRequest("the body is not valid JSON")
	}
	if _, err := dec.Token(); err != io.EOF {
		return f, badRequest("the body has more than one JSON object")
	}
	return f, nil
}

// check trims and tests what was sent. The error is a problem that names every field at fault.
func (f *fields) check(creating bool) error {
	faults := map[string]string{}
	if f.Name != nil {
		*f.Name = strings.TrimSpace(*f.Name)
		if n := utf8.RuneCountInString(*f.Name); n < 1 || n > 200 {
			faults["name"] = "must have from 1 to 200 characters"
		}
	} else if creating {
		faults["name"] = "is required"
	}
	if f.Description != nil && utf8.RuneCountInString(*f.Description) > 2000 {
		faults["description"] = "must have at most 2000 characters"
	}
	if f.Price != nil {
		if !exact(f.Price, 2, "99999999.99") {
			faults["price"] = "must be a number from 0 to 99999999.99 with at most 2 decimals"
		}
	} else if creating {
		faults["price"] = "is required"
	}
	if f.Stock != nil && !exact(f.Stock, 0, "2147483647") {
		faults["stock"] = "must be a whole number from 0 to 2147483647"
	}
	if f.Category != nil && utf8.RuneCountInString(*f.Category) > 100 {
		faults["category"] = "must have at most 100 characters"
	}
	if len(faults) > 0 {
		return &problem{Status: http.StatusUnprocessableEntity, Detail: "some fields are not valid", Errors: faults}
	}
	if *f == (fields{}) {
		return &problem{Status: http.StatusUnprocessableEntity, Detail: "no field to change was sent"}
	}
	return nil
}

// exact rewrites a JSON number (1e2, 0.10) as plain digits, and reports whether it is from 0 to most and has no more
// decimals than given.
func exact(n *json.Number, decimals int, most string) bool {
	text := string(*n)
	// A number that is much longer, or has a larger exponent, cannot be in range, but could take long to work out.
	_, exponent, _ := strings.Cut(strings.ToLower(text), "e")
	if e, err := strconv.Atoi(exponent); len(text) > 100 || exponent != "" && (err != nil || e < -100 || e > 100) {
		return false
	}
	value, ok := new(big.Rat).SetString(text)
	limit, _ := new(big.Rat).SetString(most)
	if !ok || value.Sign() < 0 || value.Cmp(limit) > 0 {
		return false
	}
	digits := value.FloatString(decimals)
	rounded, _ := new(big.Rat).SetString(digits)
	*n = json.Number(digits)
	return rounded.Cmp(value) == 0
}

// unavailable reports whether an error of a statement means that PostgreSQL cannot be used now, rather than that the
// statement is wrong.
func unavailable(err error) bool {
	if e := pq.As(err); e != nil {
		// Connection exceptions, no such database or role, out of resources, and an operator's intervention, which
		// covers shutting down, starting up and a statement that took too long; and the schema not applied yet.
		return slices.Contains([]string{"08", "28", "3D", "53", "57"}, string(e.Code.Class())) || e.Code == "42P01"
	}
	_, network := errors.AsType[net.Error](err)
	return network || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, driver.ErrBadConn) ||
		errors.Is(err, sql.ErrConnDone) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
}

// outcomeUnknown reports whether a statement that ended with err may nevertheless have been committed, now or later:
// it may not where PostgreSQL said so, or where it was never sent.
func outcomeUnknown(err error) bool {
	if _, refused := errors.AsType[*problem](err); err == nil || refused {
		return false
	}
	e := pq.As(err)
	return e == nil || e.Fatal()
}
