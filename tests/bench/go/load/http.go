package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/tokenwire/tokenwire/tests/bench/go/answer"
)

// httpTarget calls an OpenAI-compatible server over one HTTP/1.1 connection, one call at a time. It
// writes prepared bytes and reads answers itself: http.Client costs as much as some peers do.
type httpTarget struct {
	address string
	request []byte
	options options
	results *results
	conn    net.Conn
	in      *bufio.Reader
}

func newHTTPTarget(o options, r *results) (*httpTarget, error) {
	to, err := url.Parse(o.http)
	if err != nil {
		return nil, err
	}
	asked := map[string]any{
		"model":    o.model,
		"messages": []map[string]string{{"role": "user", "content": o.prompt()}},
	}
	if o.stream {
		asked["stream"] = true
		asked["stream_options"] = map[string]bool{"include_usage": true}
	}
	if o.expected.tools {
		asked["tools"] = []any{map[string]any{"type": "function", "function": map[string]any{
			"name": answer.ToolName, "parameters": json.RawMessage(toolSchema),
		}}}
	}
	body, err := json.Marshal(asked)
	if err != nil {
		return nil, err
	}
	var request bytes.Buffer
	fmt.Fprintf(&request, "POST %s HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n",
		to.Path, to.Host, len(body))
	for name, value := range o.headers {
		fmt.Fprintf(&request, "%s: %s\r\n", name, value)
	}
	request.WriteString("\r\n")
	request.Write(body)
	return &httpTarget{address: to.Host, request: request.Bytes(), options: o, results: r}, nil
}

func (t *httpTarget) call(ctx context.Context, r *receipt) (string, error) {
	status, err := t.exchange(ctx, r)
	if err != nil && t.conn != nil {
		t.conn.Close()
		t.conn = nil
	}
	return status, err
}

func (t *httpTarget) exchange(ctx context.Context, r *receipt) (string, error) {
	if t.conn == nil {
		conn, err := dialCounting(ctx, t.address, t.results)
		if err != nil {
			return broken(err), err
		}
		t.conn, t.in = conn, bufio.NewReaderSize(conn, 64<<10)
	}
	if deadline, limited := ctx.Deadline(); limited {
		t.conn.SetDeadline(deadline)
	}
	if _, err := t.conn.Write(t.request); err != nil {
		return broken(err), err
	}
	reply, err := http.ReadResponse(t.in, nil)
	if err != nil {
		return broken(err), err
	}
	if reply.StatusCode != http.StatusOK {
		said, err := io.ReadAll(reply.Body)
		if err == nil {
			err = fmt.Errorf("%.300s", said)
		}
		return strconv.Itoa(reply.StatusCode), err
	}
	if t.options.stream {
		err = readEvents(reply.Body, r)
	} else {
		err = readCompletion(reply.Body, r)
	}
	if err != nil {
		return broken(err), err
	}
	status, err := okIfWhole(r)
	if err == nil && reply.Close {
		t.conn.Close()
		t.conn = nil
	}
	return status, err
}

// said is a choice's message or delta, as far as it is looked at.
type said struct {
	Content   string `json:"content"`
	ToolCalls []struct {
		Function struct {
			Arguments string `json:"arguments"`
		} `json:"function"`
	} `json:"tool_calls"`
}

func (s said) text() string {
	text := s.Content
	for _, call := range s.ToolCalls {
		text += call.Function.Arguments
	}
	return text
}

func readCompletion(body io.Reader, r *receipt) error {
	var reply struct{ Choices []struct{ Message said } }
	if err := json.NewDecoder(body).Decode(&reply); err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, body); err != nil { // the next answer begins after its end
		return err
	}
	if len(reply.Choices) == 1 {
		r.message(reply.Choices[0].Message.text(), time.Now())
		r.ordered = true
	}
	return nil
}

// readEvents reads server-sent events of one line each, which is all that these servers send.
func readEvents(body io.Reader, r *receipt) error {
	lines := bufio.NewScanner(body)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		data, isData := bytes.CutPrefix(lines.Bytes(), []byte("data:"))
		if !isData {
			continue
		}
		if bytes.Equal(bytes.TrimSpace(data), []byte("[DONE]")) {
			r.ordered = true
			continue
		}
		var event struct{ Choices []struct{ Delta said } }
		if err := json.Unmarshal(data, &event); err != nil {
			return err
		}
		text := ""
		if len(event.Choices) > 0 {
			text = event.Choices[0].Delta.text()
		}
		r.message(text, time.Now())
	}
	return lines.Err()
}

// broken names what ended a connection, in the words of the other protocol.
func broken(err error) string {
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		return "DEADLINE_EXCEEDED"
	}
	return "UNAVAILABLE"
}
