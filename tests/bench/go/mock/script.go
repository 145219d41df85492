package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"time"

	"github.com/tokenwire/tokenwire/tests/bench/go/answer"
)

// script is what is written for one plan: the head and the first event, the tokens, the end.
type script struct {
	plan   answer.Plan
	begin  []byte
	tokens []byte // of all chunks; of one chunk if the stream is paced; nil: begin is the whole answer
	end    []byte
	stamp  int // where in tokens the stamp of a paced stream stands
}

// As OpenAI's API sends it, with the fields that no one reads.
const (
	facts = `{"id":"chatcmpl-CkQ3v8XjFh2dTq7sYpLw0NzRbE5aU","object":"%s","created":1764000000,` +
		`"model":"gpt-4o-mini-2024-07-18","service_tier":"default","system_fingerprint":"fp_560af6e559",`
	details = `"prompt_tokens_details":{"cached_tokens":0,"audio_tokens":0},"completion_tokens_details":` +
		`{"reasoning_tokens":0,"audio_tokens":0,"accepted_prediction_tokens":0,"rejected_prediction_tokens":0}`
	streamHead = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n" +
		"Cache-Control: no-cache\r\nx-request-id: req_123\r\nTransfer-Encoding: chunked\r\n\r\n"
)

var limited = whole("429 Too Many Requests", "Retry-After: 1\r\n",
	`{"error":{"message":"Rate limit reached for requests","type":"requests","param":null,"code":"rate_limit_exceeded"}}`)

func newScript(plan answer.Plan, stream, usage bool) *script {
	built := &script{plan: plan}
	if !stream {
		built.begin = whole("200 OK", "x-request-id: req_123\r\n", completion(plan))
		return built
	}
	nullUsage := ""
	if usage {
		nullUsage = `"usage":null,`
	}
	event := func(delta, finish string) []byte {
		return chunk(fmt.Sprintf(facts+`"choices":[{"index":0,"delta":%s,"logprobs":null,"finish_reason":%s}],%s`+
			`"obfuscation":"k3Vw9PzQ1e"}`, "chat.completion.chunk", delta, finish, nullUsage))
	}
	first, finish := `{"role":"assistant","content":"","refusal":null}`, `"stop"`
	token := func(text string) []byte { return event(`{"content":`+quoted(text)+`}`, "null") }
	if plan.Tools {
		first = `{"role":"assistant","content":null,"tool_calls":[{"index":0,"id":"call_1","type":"function",` +
			`"function":{"name":"` + answer.ToolName + `","arguments":""}}],"refusal":null}`
		finish = `"tool_calls"`
		token = func(text string) []byte {
			return event(`{"tool_calls":[{"index":0,"function":{"arguments":`+quoted(text)+`}}]}`, "null")
		}
	}
	built.begin = append([]byte(streamHead), event(first, "null")...)
	if plan.Rate > 0 {
		text := plan.Token(0)
		if plan.Paced() {
			text = string(answer.Stamp(nil, time.Unix(1764000000, 0)))
		}
		built.tokens = token(text)
		built.stamp = bytes.Index(built.tokens, []byte(text))
	} else {
		built.tokens = []byte{}
		for i := range plan.Chunks {
			built.tokens = append(built.tokens, token(plan.Token(i))...)
		}
	}
	built.end = event(`{}`, finish)
	if usage {
		built.end = append(built.end, chunk(fmt.Sprintf(facts+`"choices":[],"usage":%s,"obfuscation":"Zb"}`,
			"chat.completion.chunk", counted(plan.Chunks)))...)
	}
	built.end = append(append(built.end, chunk("[DONE]")...), "0\r\n\r\n"...)
	return built
}

// pace writes a stream's tokens at their times, each with the time it is sent at. A stream that fell
// behind, since its caller reads slowly, does not run after its schedule in a burst.
func (s *script) pace(conn net.Conn) error {
	if _, err := conn.Write(s.begin); err != nil {
		return err
	}
	token := bytes.Clone(s.tokens)
	interval := time.Duration(float64(time.Second) / s.plan.Rate)
	due := time.Now()
	for range s.plan.Chunks {
		due = due.Add(interval)
		wait := time.Until(due)
		if wait < -interval {
			due = due.Add(-wait)
		}
		time.Sleep(wait)
		if s.plan.Paced() {
			answer.Stamp(token[:s.stamp], time.Now())
		}
		if _, err := conn.Write(token); err != nil {
			return err
		}
	}
	_, err := conn.Write(s.end)
	return err
}

func completion(plan answer.Plan) string {
	message := `"content":` + quoted(answer.Whole)
	finish := "stop"
	if plan.Tools {
		text, _ := plan.Text()
		message = `"content":null,"tool_calls":[{"id":"call_1","type":"function","function":{"name":"` +
			answer.ToolName + `","arguments":` + quoted(text) + `}}]`
		finish = "tool_calls"
	}
	return fmt.Sprintf(facts+`"choices":[{"index":0,"message":{"role":"assistant",%s,"refusal":null,"annotations":[]},`+
		`"logprobs":null,"finish_reason":"%s"}],"usage":%s}`, "chat.completion", message, finish, counted(58))
}

func counted(tokens int) string {
	return fmt.Sprintf(`{"prompt_tokens":19,"completion_tokens":%d,"total_tokens":%d,`+details+`}`, tokens, 19+tokens)
}

// whole is an answer with a body of known length. headers: lines, each with its end.
func whole(status, headers, body string) []byte {
	return fmt.Appendf(nil, "HTTP/1.1 %s\r\nContent-Type: application/json\r\n%sContent-Length: %d\r\n\r\n%s",
		status, headers, len(body), body)
}

// chunk is one event of a stream as an HTTP chunk.
func chunk(data string) []byte {
	return fmt.Appendf(nil, "%x\r\ndata: %s\n\n\r\n", len(data)+len("data: \n\n"), data)
}

func quoted(text string) string {
	encoded, err := json.Marshal(text)
	if err != nil {
		panic(err) // a string is always JSON
	}
	return string(encoded)
}
