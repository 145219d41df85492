// Load calls a server as fast as its plan says, checks every byte of the answers, and prints one line
// of JSON: counts, times in milliseconds, and its own CPU.
//
//	load -grpc 127.0.0.1:50051 -model bench-n256 -stream -connections 4 -streams 4 -seconds 5
//	load -http http://127.0.0.1:4000/v1/chat/completions -header "Authorization=Bearer sk-1" ...
//
// Closed loop: connections x streams calls at all times, the next as soon as one ended. Open loop
// (-rate): calls begin at their times whatever becomes of earlier ones, and their times count from
// there. No call begins after -seconds, or beyond -requests; after -limit all end.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"log"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/tokenwire/tokenwire/tests/bench/go/answer"
)

type options struct {
	grpc, http           string
	model                string
	expected             expected
	headers              map[string]string
	stream               bool
	promptBytes          int
	connections, streams int
	requests             int
	rate                 float64
	ramp, seconds, limit time.Duration
	slow                 int
	slowModel            string
	slowPause            time.Duration
}

const toolSchema = `{"type":"object","properties":{"city":{"type":"string"}},"required":["city"]}`

func main() {
	o, err := parse(os.Args[1:])
	if err != nil {
		log.Fatal("load: ", err)
	}
	report, err := run(o)
	if err != nil {
		log.Fatal("load: ", err)
	}
	if err := json.NewEncoder(os.Stdout).Encode(report); err != nil {
		log.Fatal("load: ", err)
	}
}

func parse(arguments []string) (options, error) {
	o := options{headers: map[string]string{}}
	flags := flag.NewFlagSet("load", flag.ContinueOnError)
	flags.StringVar(&o.grpc, "grpc", "", "`HOST:PORT` of a server of the contract")
	flags.StringVar(&o.http, "http", "", "`URL` of OpenAI-compatible chat completions")
	flags.StringVar(&o.model, "model", "bench-n16", "a `plan`: see package answer")
	flags.BoolVar(&o.stream, "stream", false, "StreamChat, or \"stream\": true")
	flags.IntVar(&o.promptBytes, "prompt-bytes", 600, "length of the one message")
	flags.IntVar(&o.connections, "connections", 1, "")
	flags.IntVar(&o.streams, "streams", 1, "calls at once on each connection; over HTTP 1")
	flags.IntVar(&o.requests, "requests", 1_000_000, "begin no more")
	flags.Float64Var(&o.rate, "rate", 0, "open loop: calls a second")
	flags.DurationVar(&o.ramp, "ramp", 0, "closed loop: spread the first calls over this time")
	flags.DurationVar(&o.seconds, "seconds", 5*time.Second, "begin none later, such as 5s")
	flags.DurationVar(&o.limit, "limit", time.Minute, "end all that still run")
	flags.IntVar(&o.slow, "slow", 0, "this many slow readers beside, gRPC only")
	flags.StringVar(&o.slowModel, "slow-model", "bench-n20000", "what they ask")
	flags.DurationVar(&o.slowPause, "slow-pause", 100*time.Millisecond, "between two of their reads")
	flags.Func("header", "`NAME=VALUE` of each call; may be given again", func(text string) error {
		name, value, found := strings.Cut(text, "=")
		if !found {
			return fmt.Errorf("%q has no =", text)
		}
		o.headers[name] = value
		return nil
	})
	if err := flags.Parse(arguments); err != nil {
		return o, err
	}
	if (o.grpc == "") == (o.http == "") {
		return o, fmt.Errorf("one of -grpc and -http is needed")
	}
	if o.http != "" && (o.streams != 1 || o.slow != 0) {
		return o, fmt.Errorf("over HTTP/1.1 a connection carries one call at a time, and no one reads slowly")
	}
	plan, err := answer.Parse(o.model)
	o.expected = expect(plan, o.stream)
	return o, err
}

// prompt is a text of the length asked for.
func (o options) prompt() string {
	const sentence = "Explain how a gateway relays tokens from a model to its caller. "
	return strings.Repeat(sentence, o.promptBytes/len(sentence)+1)[:o.promptBytes]
}

// target is where one worker sends its calls. A call's status is `ok`, or what it ended with.
type target interface {
	call(context.Context, *receipt) (string, error)
}

func (o options) targets(r *results) ([]target, error) {
	var all []target
	for range o.connections {
		if o.http != "" {
			one, err := newHTTPTarget(o, r)
			if err != nil {
				return nil, err
			}
			all = append(all, one)
			continue
		}
		one, err := dialGRPC(o, r, false)
		if err != nil {
			return nil, err
		}
		for range o.streams {
			all = append(all, one)
		}
	}
	return all, nil
}

func run(o options) (map[string]any, error) {
	r := newResults()
	targets, err := o.targets(r)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), o.limit)
	defer cancel()
	for range o.slow {
		slow, err := dialGRPC(o, r, true)
		if err != nil {
			return nil, err
		}
		go slow.readSlowly(ctx, o.slowPause)
	}
	began := time.Now()
	if o.rate > 0 {
		openLoop(ctx, o, targets, r)
	} else {
		closedLoop(ctx, o, targets, r)
	}
	return report(r, time.Since(began))
}

func closedLoop(ctx context.Context, o options, targets []target, r *results) {
	var workers sync.WaitGroup
	var begun atomic.Int64
	end := time.Now().Add(o.seconds)
	for i, to := range targets {
		workers.Add(1)
		go func() {
			defer workers.Done()
			sleep(ctx, o.ramp*time.Duration(i)/time.Duration(len(targets)))
			for ctx.Err() == nil && time.Now().Before(end) && begun.Add(1) <= int64(o.requests) {
				one(ctx, o, to, time.Now(), r)
			}
		}()
	}
	workers.Wait()
}

func openLoop(ctx context.Context, o options, targets []target, r *results) {
	var workers sync.WaitGroup
	due := make(chan time.Time)
	for _, to := range targets {
		workers.Add(1)
		go func() {
			defer workers.Done()
			for at := range due {
				one(ctx, o, to, at, r)
			}
		}()
	}
	began := time.Now()
	interval := time.Duration(float64(time.Second) / o.rate)
	for i := range o.requests {
		at := began.Add(interval * time.Duration(i))
		if at.Sub(began) >= o.seconds || ctx.Err() != nil {
			break
		}
		sleep(ctx, time.Until(at))
		select {
		case due <- at:
		default: // every slot is taken
			r.mu.Lock()
			r.missed++
			r.mu.Unlock()
		}
	}
	close(due)
	workers.Wait()
}

// one makes one call. began: when it was due.
func one(ctx context.Context, o options, to target, began time.Time, r *results) {
	r.begin()
	status, err := to.call(ctx, &receipt{results: r, expected: &o.expected, began: began})
	r.end(status, err, time.Since(began))
}

func report(r *results, wall time.Duration) (map[string]any, error) {
	var used syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &used); err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return map[string]any{
		"status": r.status, "errors": r.errors, "issued": r.issued, "missed": r.missed, "peak": r.peak,
		"messages": r.messages, "tokens": r.tokens, "bytes": r.bytes.Load(),
		"wall_seconds": wall.Seconds(), "cpu_seconds": float64(used.Utime.Nano()+used.Stime.Nano()) / 1e9,
		"latency_ms": r.latency.Summary(), "refused_ms": r.refused.Summary(), "ttft_ms": r.ttft.Summary(),
		"lag_ms": r.lag.Summary(), "gap_ms": r.gap.Summary(),
	}, nil
}

// okIfWhole is the status of an answer that its server calls complete. WRONG is what must never be.
func okIfWhole(r *receipt) (string, error) {
	if err := r.whole(); err != nil {
		return "WRONG", err
	}
	return ok, nil
}

// sleep waits, or until its context ends.
func sleep(ctx context.Context, d time.Duration) {
	if d <= 0 {
		return
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// countingConn counts what is read.
type countingConn struct {
	net.Conn
	results *results
}

func dialCounting(ctx context.Context, address string, r *results) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	return countingConn{conn, r}, nil
}

func (c countingConn) Read(to []byte) (int, error) {
	n, err := c.Conn.Read(to)
	c.results.bytes.Add(int64(n))
	return n, err
}
