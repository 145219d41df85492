// Conformance runs the conformance cases with the Go client: see tests/conformance/README.md.
package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/codes"

	tokenwire "github.com/tokenwire/tokenwire/clients/go"
)

type testCase struct {
	Name        string            `json:"name"`
	Op          string            `json:"op"`
	Request     request           `json:"request"`
	Mode        string            `json:"mode"`
	TimeoutMS   int               `json:"timeout_ms"`
	RequestID   string            `json:"request_id"`
	Metadata    map[string]string `json:"metadata"`
	Leave       leave             `json:"leave"`
	ReadDelayMS int               `json:"read_delay_ms"`
	PauseMS     int               `json:"pause_ms"`
	Repeat      int               `json:"repeat"`
	GapMS       int               `json:"gap_ms"`
}

type leave struct {
	AfterText *int `json:"after_text"`
	AfterMS   *int `json:"after_ms"`
}

type request struct {
	CustomID    string `json:"custom_id"`
	Model       string `json:"model"`
	Prompt      string `json:"prompt"`
	PromptBytes int    `json:"prompt_bytes"`
	Messages    []struct {
		Role    string `json:"role"`
		Content string `json:"content"`
	} `json:"messages"`
	Temperature         *float64 `json:"temperature"`
	TopK                *int     `json:"top_k"`
	MaxCompletionTokens *int     `json:"max_completion_tokens"`
	ChoiceCount         *int     `json:"choice_count"`
	Stop                []string `json:"stop"`
	Tools               []struct {
		Name        string          `json:"name"`
		Description string          `json:"description"`
		Parameters  json.RawMessage `json:"parameters"`
	} `json:"tools"`
	ToolChoice    tokenwire.ToolChoice `json:"tool_choice"`
	JSONSchema    json.RawMessage      `json:"json_schema"`
	RoleTemplates []struct {
		Role         string `json:"role"`
		APIRole      string `json:"api_role"`
		Begin        string `json:"begin"`
		End          string `json:"end"`
		FallbackRole string `json:"fallback_role"`
	} `json:"role_templates"`
	UnsupportedParameters string            `json:"unsupported_parameters"`
	ExtraBody             json.RawMessage   `json:"extra_body"`
	Labels                map[string]string `json:"labels"`

	Items          []request `json:"items"`
	MaxConcurrency int       `json:"max_concurrency"`
	Texts          []string  `json:"texts"`
}

type connect struct {
	Target   string `json:"target"`
	Token    string `json:"token"`
	CAFile   string `json:"ca_file"`
	CertFile string `json:"cert_file"`
	KeyFile  string `json:"key_file"`
}

type line map[string]any

func main() {
	input := bufio.NewReader(os.Stdin)
	output := json.NewEncoder(os.Stdout)
	for {
		text, err := input.ReadBytes('\n')
		if err != nil {
			return // its input has ended
		}
		var asked struct {
			Case    testCase `json:"case"`
			Connect connect  `json:"connect"`
		}
		var answer line
		if err := json.Unmarshal(text, &asked); err != nil {
			answer = line{"defect": err.Error()}
		} else {
			answer = answerTo(asked.Case, asked.Connect)
		}
		answer["case"] = asked.Case.Name
		if err := output.Encode(answer); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
}

func answerTo(c testCase, to connect) line {
	client, err := to.client()
	if err != nil {
		return told(err)
	}
	defer client.Close()
	earlier := 0
	for range c.Repeat - 1 {
		if answer, err := once(client, c); err == nil && answer["ok"] == true {
			earlier++
		}
		time.Sleep(milliseconds(c.GapMS))
	}
	answer, err := once(client, c)
	if err != nil {
		return told(err)
	}
	answer["earlier"] = earlier
	return answer
}

func (to connect) client() (*tokenwire.Client, error) {
	options := []tokenwire.Option{tokenwire.WithToken(to.Token)}
	if to.CAFile != "" {
		options = append(options, tokenwire.WithCAFile(to.CAFile))
	}
	if to.CertFile != "" {
		options = append(options, tokenwire.WithCertificateFiles(to.CertFile, to.KeyFile))
	}
	return tokenwire.New(to.Target, options...)
}

func once(client *tokenwire.Client, c testCase) (line, error) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	if c.TimeoutMS > 0 {
		ctx, cancel = context.WithTimeout(ctx, milliseconds(c.TimeoutMS))
		defer cancel()
	}
	if c.Leave.AfterMS != nil {
		defer time.AfterFunc(milliseconds(*c.Leave.AfterMS), cancel).Stop()
	}
	options := c.options()
	switch c.Op {
	case "chat":
		reply, err := client.Chat(ctx, c.Request.chat(), options...)
		if err != nil {
			return nil, err
		}
		return answered(c, reply)
	case "stream":
		return stream(ctx, client, c)
	case "batch", "batch_ordered":
		return batch(ctx, client, c)
	case "count_tokens":
		count, err := client.CountTokens(ctx, c.Request.Model, c.Request.Prompt, options...)
		return line{"ok": true, "tokens": count.Total, "tokenizer": count.Tokenizer}, err
	case "tokenize":
		lists, err := client.Tokenize(ctx, c.Request.Model, c.Request.Texts, options...)
		ids, pieces := make([][]int, len(lists)), make([][]string, len(lists))
		for i, tokens := range lists {
			ids[i], pieces[i] = append([]int{}, tokens.IDs...), []string{}
			for _, piece := range tokens.Pieces {
				pieces[i] = append(pieces[i], hex.EncodeToString(piece))
			}
		}
		return line{"ok": true, "ids": ids, "pieces": pieces}, err
	case "models":
		models, err := client.Models(ctx, options...)
		names := []string{}
		for _, model := range models {
			names = append(names, model.Name)
		}
		return line{"ok": true, "models": names}, err
	}
	return nil, fmt.Errorf("no op %q", c.Op)
}

func stream(ctx context.Context, client *tokenwire.Client, c testCase) (line, error) {
	var options []tokenwire.StreamOption
	for _, option := range c.options() {
		options = append(options, option)
	}
	if c.Mode == "cumulative" {
		options = append(options, tokenwire.Cumulative())
	}
	kinds, states := []string{}, []string{}
	pause := c.PauseMS
	s := client.Stream(ctx, c.Request.chat(), options...)
	for event, err := range s.All() {
		if err != nil {
			return nil, err
		}
		kinds = append(kinds, string(event.Kind))
		if event.Kind == tokenwire.EventSnapshot {
			state := event.Proto().GetSnapshot().GetState().String()
			states = append(states, strings.TrimPrefix(state, "STATE_"))
		}
		time.Sleep(milliseconds(c.ReadDelayMS + pause))
		pause = 0
		if c.Leave.AfterText != nil && len([]rune(s.SoFar().Text())) >= *c.Leave.AfterText {
			return line{"ok": true, "left": true, "partial_text": s.SoFar().Text()}, nil
		}
	}
	reply, err := s.Reply()
	if err != nil {
		return nil, err
	}
	answer, err := answered(c, reply)
	if err != nil {
		return nil, err
	}
	answer["kinds"] = slices.Compact(kinds)
	if len(states) > 0 {
		answer["states"] = slices.Compact(states)
	}
	return answer, nil
}

func batch(ctx context.Context, client *tokenwire.Client, c testCase) (line, error) {
	options := []tokenwire.BatchOption{tokenwire.MaxConcurrency(c.Request.MaxConcurrency)}
	for _, option := range c.options() {
		options = append(options, option)
	}
	requests := make([]tokenwire.Request, len(c.Request.Items))
	for i, item := range c.Request.Items {
		requests[i] = item.chat()
	}
	var results []tokenwire.BatchResult
	if c.Op == "batch_ordered" {
		var err error
		if results, err = client.BatchOrdered(ctx, requests, options...); err != nil {
			return nil, err
		}
	} else {
		for result, err := range client.Batch(ctx, requests, options...) {
			if err != nil {
				return nil, err
			}
			results = append(results, result)
		}
		slices.SortFunc(results, func(a, b tokenwire.BatchResult) int { return cmp.Compare(a.Index, b.Index) })
	}
	rows := []line{}
	for _, result := range results {
		row := line{"index": result.Index, "custom_id": result.CustomID}
		if result.Err != nil {
			row["error"] = told(result.Err)["error"]
		} else {
			row["text"] = result.Reply.Text()
		}
		rows = append(rows, row)
	}
	return line{"ok": true, "results": rows}, nil
}

// --- what is asked ------------------------------------------------------------------

func (c testCase) options() []tokenwire.CallOption {
	var options []tokenwire.CallOption
	if c.RequestID != "" {
		options = append(options, tokenwire.WithRequestID(c.RequestID))
	}
	for key, value := range c.Metadata {
		options = append(options, tokenwire.WithMetadata(key, value))
	}
	return options
}

func (r request) chat() tokenwire.Request {
	asked := tokenwire.Request{
		Model:               r.Model,
		Prompt:              r.Prompt,
		Temperature:         r.Temperature,
		TopK:                r.TopK,
		MaxCompletionTokens: r.MaxCompletionTokens,
		ChoiceCount:         r.ChoiceCount,
		Stop:                r.Stop,
		ToolChoice:          r.ToolChoice,
		DropUnsupported:     r.UnsupportedParameters == "drop",
		Labels:              r.Labels,
		CustomID:            r.CustomID,
	}
	if r.PromptBytes > 0 {
		asked.Prompt = strings.Repeat("a", r.PromptBytes)
	}
	for _, message := range r.Messages {
		asked.Messages = append(asked.Messages, tokenwire.Message{Role: message.Role, Content: message.Content})
	}
	for _, tool := range r.Tools {
		asked.Tools = append(asked.Tools, tokenwire.Tool{
			Name: tool.Name, Description: tool.Description, Parameters: tool.Parameters,
		})
	}
	for _, t := range r.RoleTemplates {
		asked.RoleTemplates = append(asked.RoleTemplates, tokenwire.RoleTemplate(t))
	}
	if r.JSONSchema != nil {
		asked.Format = tokenwire.JSONSchema(r.JSONSchema)
	}
	if r.ExtraBody != nil {
		asked.ExtraBody = r.ExtraBody
	}
	return asked
}

// --- what is told -------------------------------------------------------------------

func answered(c testCase, reply *tokenwire.Reply) (line, error) {
	choices := []line{}
	for _, choice := range reply.Choices {
		calls := []line{}
		for _, call := range choice.Message.ToolCalls {
			arguments, err := tokenwire.DecodeArguments[map[string]any](call)
			if err != nil {
				return nil, err
			}
			calls = append(calls, line{"id": call.ID, "name": call.Name, "arguments": arguments})
		}
		choices = append(choices, line{
			"index":         choice.Index,
			"text":          choice.Message.Content,
			"reasoning":     choice.Message.Reasoning,
			"finish_reason": strings.ToUpper(string(choice.FinishReason)),
			"tool_calls":    calls,
		})
	}
	answer := line{
		"ok":      true,
		"choices": choices,
		"usage": line{
			"prompt":     reply.Usage.PromptTokens,
			"completion": reply.Usage.CompletionTokens,
			"total":      reply.Usage.TotalTokens,
			"estimated":  reply.Usage.Estimated,
		},
		"header": line{
			"model":    reply.Header.Model,
			"upstream": reply.Header.Upstream,
			"attempts": len(reply.Header.Attempts),
			"dropped":  append([]string{}, reply.Header.DroppedParameters...),
		},
		"request_id": reply.RequestID != "",
	}
	if c.Request.JSONSchema != nil {
		parsed, err := tokenwire.Decode[map[string]any](reply)
		if err != nil {
			return nil, err
		}
		answer["json"] = parsed
	}
	return answer, nil
}

func told(err error) line {
	var failed *tokenwire.Error
	if !errors.As(err, &failed) {
		return line{"defect": fmt.Sprintf("%T: %v", err, err)}
	}
	var after any
	if delay, ok := failed.RetryAfter(); ok {
		after = delay.Milliseconds()
	}
	fields := []string{}
	for _, violation := range failed.FieldViolations {
		fields = append(fields, violation.Field)
	}
	return line{"ok": false, "error": line{
		"code":           codeName(failed.Code),
		"reason":         failed.Reason,
		"retry_after_ms": after,
		"retryable":      failed.IsRetryable(),
		"attempts":       failed.Attempts,
		"request_id":     failed.RequestID != "",
		"partial_text":   failed.PartialText(),
		"fields":         fields,
	}}
}

// codeName is the code as the contract spells it: Go's own spelling is ResourceExhausted.
func codeName(code codes.Code) string {
	if code == codes.Canceled {
		return "CANCELLED"
	}
	var name strings.Builder
	for i, c := range code.String() {
		if i > 0 && 'A' <= c && c <= 'Z' {
			name.WriteByte('_')
		}
		name.WriteRune(c)
	}
	return strings.ToUpper(name.String())
}

func milliseconds(n int) time.Duration { return time.Duration(n) * time.Millisecond }
