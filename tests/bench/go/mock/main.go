// Mock is an OpenAI-compatible upstream that costs next to nothing: what it sends is built beforehand.
//
//	mock 127.0.0.1:9000
//
// POST of any path is a chat completion, answered by the plan in its model's name (package answer).
// Each event of a stream is an HTTP chunk of its own, as real servers send them. GET of any path
// gives its counters and its own CPU time. It speaks HTTP/1.1 itself: net/http would cost more than
// all the rest of it, and takes a system call for each event that leaves in a chunk of its own.
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/tokenwire/tokenwire/tests/bench/go/answer"
)

func main() {
	if len(os.Args) != 2 {
		log.Fatal("usage: mock HOST:PORT")
	}
	listener, err := net.Listen("tcp", os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(listener.Addr()) // whoever started it waits for this line
	log.Fatal(new(server).serve(listener))
}

// server counts what it is asked. The zero value is ready.
type server struct {
	requests, limited, aborted, chunks, connections atomic.Int64
	scripts                                         sync.Map // model and options -> *script
}

func (s *server) serve(listener net.Listener) error {
	for {
		conn, err := listener.Accept()
		if err != nil {
			return err
		}
		s.connections.Add(1)
		go func() {
			defer s.connections.Add(-1)
			defer conn.Close()
			s.converse(conn)
		}()
	}
}

// converse answers the requests of one connection until its caller leaves.
func (s *server) converse(conn net.Conn) {
	in := bufio.NewReaderSize(conn, 64<<10)
	var body bytes.Buffer
	for {
		request, err := http.ReadRequest(in)
		if err != nil {
			return
		}
		body.Reset()
		if request.Header.Get("Expect") != "" {
			io.WriteString(conn, "HTTP/1.1 100 Continue\r\n\r\n")
		}
		if _, err := body.ReadFrom(request.Body); err != nil {
			return
		}
		if request.Method != http.MethodPost {
			err = s.writeCounters(conn)
		} else {
			err = s.answer(conn, request.Header, body.Bytes())
		}
		if err != nil {
			s.aborted.Add(1)
			return
		}
	}
}

// answer writes one answer. An error means that the caller has left.
func (s *server) answer(conn net.Conn, header http.Header, body []byte) error {
	s.requests.Add(1)
	model := field(body, `"model"`)
	script, err := s.script(model, asks(body, `"stream"`, "true"), asks(body, `"include_usage"`, "true"))
	if err != nil {
		_, err = conn.Write(whole("400 Bad Request", "", fmt.Sprintf(`{"error":{"message":%q}}`, err)))
		return err
	}
	if script.plan.KeyIsLimited(strings.TrimPrefix(header.Get("Authorization"), "Bearer ")) {
		s.limited.Add(1)
		_, err := conn.Write(limited)
		return err
	}
	time.Sleep(script.plan.Delay)
	if script.tokens == nil {
		_, err := conn.Write(script.begin)
		return err
	}
	s.chunks.Add(int64(script.plan.Chunks))
	if script.plan.Rate == 0 {
		return writeAll(conn, script.begin, script.tokens, script.end)
	}
	return script.pace(conn)
}

// script gives what is written for a model, built once.
func (s *server) script(model string, stream, usage bool) (*script, error) {
	key := fmt.Sprint(model, stream, usage)
	if built, ok := s.scripts.Load(key); ok {
		return built.(*script), nil
	}
	plan, err := answer.Parse(model)
	if err != nil {
		return nil, err
	}
	built := newScript(plan, stream, usage)
	s.scripts.Store(key, built)
	return built, nil
}

func (s *server) writeCounters(conn net.Conn) error {
	var used syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &used); err != nil {
		return err
	}
	counters, err := json.Marshal(map[string]any{
		"requests":    s.requests.Load(),
		"limited":     s.limited.Load(),
		"aborted":     s.aborted.Load(),
		"chunks":      s.chunks.Load(),
		"connections": s.connections.Load(),
		"cpu_seconds": float64(used.Utime.Nano()+used.Stime.Nano()) / 1e9,
		"object":      "list", // a peer that asks for the models finds none, and no error
		"data":        []string{},
	})
	if err != nil {
		return err
	}
	_, err = conn.Write(whole("200 OK", "", string(counters)))
	return err
}

// writeAll writes in pieces of 32 KiB at most, so that a stream's bytes come in several reads.
func writeAll(conn net.Conn, parts ...[]byte) error {
	for _, part := range parts {
		for len(part) > 0 {
			piece := part[:min(len(part), 32<<10)]
			if _, err := conn.Write(piece); err != nil {
				return err
			}
			part = part[len(piece):]
		}
	}
	return nil
}

// field reads the text after a name in a JSON object without parsing the rest, which may be megabytes.
func field(body []byte, name string) string {
	_, after, found := bytes.Cut(body, []byte(name))
	if !found {
		return ""
	}
	_, after, _ = bytes.Cut(after, []byte(`"`))
	text, _, _ := bytes.Cut(after, []byte(`"`))
	return string(text)
}

// asks tells whether a JSON object has a name with a value, whatever blanks stand between.
func asks(body []byte, name, value string) bool {
	_, after, found := bytes.Cut(body, []byte(name))
	return found && bytes.HasPrefix(bytes.TrimLeft(after, ": "), []byte(value))
}
