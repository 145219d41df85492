// Package answer says what the mock upstream answers: the mock writes it, the load generator checks it.
//
// A model's name is a plan of its answer, such as "bench-n256-r50" (see Parse), so that any number of
// scenarios need no configuration in the gateway that is measured, nor in its peers.
package answer

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Plan is what one request is answered with.
type Plan struct {
	Chunks  int           // n: content chunks of a stream (default 16)
	Rate    float64       // r: chunks a second; 0: as fast as they are taken
	Delay   time.Duration // d: milliseconds before the first byte
	Tools   bool          // t1: the chunks are arguments of a tool call
	Limited int           // e: percent of keys that are answered with 429, in steps of ten
}

// Parse reads a plan from a model's name: fields after the first, separated by "-", each a letter and
// a number. Peers put the provider before the name ("openai/bench-n16"); that is ignored.
func Parse(model string) (Plan, error) {
	plan := Plan{Chunks: 16}
	fields := strings.Split(model[strings.LastIndexByte(model, '/')+1:], "-")
	for _, field := range fields[1:] {
		if field == "" {
			return plan, fmt.Errorf("model %q: an empty field", model)
		}
		number, err := strconv.ParseFloat(field[1:], 64)
		if err != nil || number < 0 {
			return plan, fmt.Errorf("model %q: %q is no letter with a number", model, field)
		}
		switch field[0] {
		case 'n':
			plan.Chunks = int(number)
		case 'r':
			plan.Rate = number
		case 'd':
			plan.Delay = time.Duration(number * float64(time.Millisecond))
		case 't':
			plan.Tools = number != 0
		case 'e':
			plan.Limited = int(number)
		default:
			return plan, fmt.Errorf("model %q: %q is none of n, r, d, t, e", model, field)
		}
	}
	return plan, nil
}

// KeyIsLimited tells whether a key is one of those answered with 429: by its last digit, so that of
// ten keys numbered 0 to 9 exactly Limited percent are.
func (p Plan) KeyIsLimited(key string) bool {
	if p.Limited == 0 || key == "" {
		return false
	}
	digit := key[len(key)-1] - '0'
	return digit < 10 && int(digit)*10 < p.Limited
}

// Paced tells whether tokens carry the time they were sent at (see Stamp).
func (p Plan) Paced() bool { return p.Rate > 0 && !p.Tools }

// Whole is the content of an answer that is not streamed: two short paragraphs.
const Whole = "Gateways relay requests from clients to model servers. They add authentication, retries, rate " +
	"limits, accounting and observability, and they ought to cost little: a few hundred microseconds of CPU per " +
	"request and a few tens of microseconds per streamed token.\nKeep-alive connections and typed decoding help most."

// ToolName is the function that a plan with Tools calls.
const ToolName = "get_weather"

// Tokens of unpaced content, in turn: with what JSON must escape, and with bytes beyond ASCII.
var tokens = [...]string{
	" the", " quick", ",", " model", "s", " can", " relay", ".\n", " \"quote", "été", " tokens", " with", " low",
	" cost", " per", " step",
}

// Token is the text of unpaced chunk i.
func (p Plan) Token(i int) string {
	if p.Tools {
		return `[` + strconv.Itoa(i%10) + `],`
	}
	return tokens[i%len(tokens)]
}

// Text is the whole content of an unpaced stream, and where each token of it ends, in bytes.
func (p Plan) Text() (string, []int) {
	var text strings.Builder
	ends := make([]int, p.Chunks)
	for i := range ends {
		text.WriteString(p.Token(i))
		ends[i] = text.Len()
	}
	return text.String(), ends
}

// StampLength is the length of a paced token in bytes.
const StampLength = 21

// Stamp appends a paced token: a blank, "T", and the time in nanoseconds since 1970, 19 digits.
func Stamp(to []byte, at time.Time) []byte {
	return strconv.AppendInt(append(to, " T"...), at.UnixNano(), 10)
}

// Stamped reads one token that Stamp wrote.
func Stamped(token string) (time.Time, error) {
	if len(token) != StampLength || token[:2] != " T" {
		return time.Time{}, fmt.Errorf("%q is no stamped token", token)
	}
	nanoseconds, err := strconv.ParseInt(token[2:], 10, 64)
	if err != nil {
		return time.Time{}, fmt.Errorf("%q is no stamped token", token)
	}
	return time.Unix(0, nanoseconds), nil
}
