package main

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tokenwire/tokenwire/tests/bench/go/answer"
)

// ok is the status of an answer that was read to its end and is, to the byte, what the mock sent.
const ok = "OK"

// results is what all calls together gave.
type results struct {
	bytes atomic.Int64 // read from sockets

	mu       sync.Mutex
	status   map[string]int
	errors   []string // the first few, for whoever wonders
	messages int64
	tokens   int64
	inFlight int
	peak     int
	issued   int
	missed   int       // open loop: due while every slot was taken
	latency  Histogram // of whole calls that ended with ok
	refused  Histogram // of calls that did not
	ttft     Histogram // from the call to its first text
	lag      Histogram // of stamped tokens, from the mock's write to here
	gap      Histogram // between two tokens of one stream
}

func newResults() *results { return &results{status: map[string]int{}} }

func (r *results) begin() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.issued++
	r.inFlight++
	r.peak = max(r.peak, r.inFlight)
}

func (r *results) end(status string, err error, took time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.inFlight--
	r.status[status]++
	if status == ok {
		r.latency.Add(took)
		return
	}
	r.refused.Add(took)
	if err != nil && len(r.errors) < 3 {
		r.errors = append(r.errors, status+": "+err.Error())
	}
}

// expected is the answer that every call must get.
type expected struct {
	tokens int
	text   string // empty where its tokens are stamps
	ends   []int  // of its tokens, in bytes
	tools  bool
}

func expect(plan answer.Plan, stream bool) expected {
	want := expected{tokens: plan.Chunks, tools: plan.Tools}
	switch {
	case !stream:
		want.text = answer.Whole
		if plan.Tools {
			want.text, _ = plan.Text()
		}
		want.tokens, want.ends = 1, []int{len(want.text)} // it comes as one
	case !plan.Paced():
		want.text, want.ends = plan.Text()
	}
	return want
}

// receipt checks the text of one answer as it comes, and takes its times.
type receipt struct {
	results  *results
	expected *expected
	began    time.Time

	length  int    // of text received, in bytes
	tokens  int    // whole ones
	carry   string // the begin of a stamped token whose end is still to come
	last    time.Time
	wrong   error
	ordered bool // what the contract, or SSE, ends a complete answer with has come
}

var errIncomplete = errors.New("it ended with OK, but was not whole")

// message takes what one message carried.
func (r *receipt) message(text string, at time.Time) {
	r.results.mu.Lock()
	defer r.results.mu.Unlock()
	r.results.messages++
	if text == "" {
		return
	}
	if r.length == 0 {
		r.results.ttft.Add(at.Sub(r.began))
	}
	r.length += len(text)
	want := r.expected
	if want.ends == nil {
		r.stamped(text, at)
		return
	}
	if !strings.HasPrefix(want.text[min(r.length-len(text), len(want.text)):], text) {
		r.wrong = fmt.Errorf("%q is not what comes at byte %d", text, r.length-len(text))
	}
	for r.tokens < len(want.ends) && want.ends[r.tokens] <= r.length {
		r.token(at)
	}
}

func (r *receipt) stamped(text string, at time.Time) {
	text = r.carry + text
	for ; len(text) >= answer.StampLength; text = text[answer.StampLength:] {
		sent, err := answer.Stamped(text[:answer.StampLength])
		if err != nil {
			r.wrong = err
			return
		}
		r.results.lag.Add(at.Sub(sent))
		r.token(at)
	}
	r.carry = text
}

func (r *receipt) token(at time.Time) {
	r.tokens++
	r.results.tokens++
	if !r.last.IsZero() {
		r.results.gap.Add(at.Sub(r.last))
	}
	r.last = at
}

// whole says what is wrong with an answer that claims to be complete; nil: nothing.
func (r *receipt) whole() error {
	switch {
	case r.wrong != nil:
		return r.wrong
	case !r.ordered || r.tokens != r.expected.tokens || r.carry != "":
		return fmt.Errorf("%w: %d of %d tokens, proper end: %t", errIncomplete, r.tokens, r.expected.tokens, r.ordered)
	}
	return nil
}
