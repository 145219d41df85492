package tokenwire

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	pb "github.com/tokenwire/tokenwire/clients/go/tokenwire/v1"
)

// Reply is an answer: a whole one, or, as [Stream.SoFar] and [Error.Partial], what had arrived of
// one. The methods are shortcuts to the first choice.
type Reply struct {
	// Choices by index: one unless Request.ChoiceCount asked for more.
	Choices []Choice
	// Header tells who answered and what was tried.
	Header Header
	// Usage is zero until the answer is whole.
	Usage Usage
	// RequestID is the call's x-request-id.
	RequestID string

	proto *pb.ChatResponse
}

// Choice is one of the answers to one request.
type Choice struct {
	// Index from 0.
	Index int
	// Message is the answer; append it to the conversation to go on.
	Message Message
	// FinishReason is "" while the choice grows.
	FinishReason FinishReason
	// FinishReasonRaw is the upstream's own word for it.
	FinishReasonRaw string
	// Extra is a JSON object with fields of the upstream that this version does not model.
	Extra json.RawMessage

	proto *pb.Choice
}

// FinishReason is why a choice ended.
type FinishReason string

// Why a choice ended.
const (
	FinishStop          FinishReason = "stop"           // its natural end, or a stop string
	FinishLength        FinishReason = "length"         // MaxCompletionTokens or the context window
	FinishToolCalls     FinishReason = "tool_calls"     // the model wants tools called
	FinishContentFilter FinishReason = "content_filter" // content was withheld
	FinishOther         FinishReason = "other"          // anything else; see FinishReasonRaw
)

// Header tells what is known of an answer before its text.
type Header struct {
	ID                  string
	Model               string // that answers, after aliases and fallbacks
	Upstream            string // as the gateway's configuration names it
	Created             time.Time
	SystemFingerprint   string
	ServiceTier         string
	MaxCompletionTokens int // cap in force; 0 when none
	DroppedParameters   []string
	// Attempts at upstreams, in order; the one that answers is the last.
	Attempts []Attempt
	// Extra is a JSON object with fields of the upstream that this version does not model.
	Extra json.RawMessage
}

// Attempt is one try at one upstream with one key.
type Attempt struct {
	Upstream   string
	KeyID      string // a name or fingerprint, never the key
	HTTPStatus int    // 0 when none arrived
	Reason     Reason // how it failed; "" for the one that answers
	Duration   time.Duration
}

// Usage is what a call has cost, in tokens.
type Usage struct {
	PromptTokens     int // cached ones included
	CompletionTokens int // reasoning included
	TotalTokens      int // as the upstream reported it
	// Parts of the above; nil when not reported.
	CachedPromptTokens *int
	CacheWriteTokens   *int
	ReasoningTokens    *int
	// Estimated tells that the gateway counted because the upstream did not report.
	Estimated bool
	// Extra is a JSON object with fields of the upstream that this version does not model.
	Extra json.RawMessage
}

// TokenLogprob is the log probability of one sampled token.
type TokenLogprob struct {
	Token   string // U+FFFD where Bytes are not UTF-8
	Logprob float64
	Bytes   []byte
	Top     []TokenLogprob // alternatives, most likely first
}

// First returns the first choice; an empty one when there is none.
func (r *Reply) First() Choice {
	if r == nil || len(r.Choices) == 0 {
		return Choice{proto: &pb.Choice{}}
	}
	return r.Choices[0]
}

// Text returns the first choice's text; "" when there is none, as when the model only calls tools.
func (r *Reply) Text() string { return r.First().Message.Content }

// Message returns the first choice's message; append it to the conversation to go on.
func (r *Reply) Message() Message { return r.First().Message }

// Reasoning returns what the model showed of its reasoning in the first choice; usually "".
func (r *Reply) Reasoning() string { return r.First().Message.Reasoning }

// Refusal returns why the model declined the first choice; usually "".
func (r *Reply) Refusal() string { return r.First().Message.Refusal }

// ToolCalls returns the calls that the first choice wants made.
func (r *Reply) ToolCalls() []ToolCall { return r.First().Message.ToolCalls }

// FinishReason returns why the first choice ended.
func (r *Reply) FinishReason() FinishReason { return r.First().FinishReason }

// Proto returns the reply as the contract has it; do not change it.
func (r *Reply) Proto() *pb.ChatResponse { return r.proto }

// ReplyFromProto returns the reply that one of the contract stands for, and keeps it.
func ReplyFromProto(p *pb.ChatResponse) *Reply { return newReply(p, "") }

// Decode parses the text of the first choice as JSON, for requests with a [JSONSchema] or
// [JSONObject]. It fails when the text is not JSON, as after [FinishLength].
func Decode[T any](reply *Reply) (T, error) { return DecodeChoice[T](reply.First()) }

// DecodeChoice is [Decode] for a choice.
func DecodeChoice[T any](choice Choice) (T, error) {
	var value T
	text := bytes.TrimSpace([]byte(choice.Message.Content))
	err := json.Unmarshal(text, &value)
	if err == nil {
		return value, nil
	}
	if len(text) == 0 {
		err = errors.New("there is no text")
	}
	why := fmt.Sprintf("finish reason %q", string(choice.FinishReason))
	if choice.Message.Refusal != "" {
		why += ", refusal " + start([]byte(choice.Message.Refusal))
	}
	var zero T // json.Unmarshal may have filled a part
	return zero, fmt.Errorf("tokenwire: decoding the answer (%s): %w: %s", why, err, start(text))
}

// Logprobs returns the log probabilities of the content, if Request.Logprobs asked for them.
func (c Choice) Logprobs() []TokenLogprob { return logprobs(c.proto.GetLogprobs()) }

// Proto returns the choice as the contract has it; do not change it.
func (c Choice) Proto() *pb.Choice { return c.proto }

func newReply(p *pb.ChatResponse, requestID string) *Reply {
	reply := &Reply{
		Header: headerOf(p.GetHeader()), Usage: usageOf(p.GetUsage()), RequestID: requestID, proto: p,
	}
	for _, choice := range p.GetChoices() {
		reply.Choices = append(reply.Choices, Choice{
			Index:           int(choice.GetIndex()),
			Message:         MessageFromProto(choice.GetMessage()),
			FinishReason:    finishReasonOf(choice.GetFinishReason()),
			FinishReasonRaw: choice.GetFinishReasonRaw(),
			Extra:           raw(choice.GetExtraJson()),
			proto:           choice,
		})
	}
	return reply
}

func finishReasonOf(p pb.FinishReason) FinishReason {
	name, known := pb.FinishReason_name[int32(p)]
	switch {
	case p == pb.FinishReason_FINISH_REASON_UNSPECIFIED:
		return ""
	case !known:
		return FinishOther // a value newer than this package
	}
	return FinishReason(strings.ToLower(strings.TrimPrefix(name, "FINISH_REASON_")))
}

func headerOf(p *pb.ResponseHeader) Header {
	header := Header{
		ID: p.GetId(), Model: p.GetModel(), Upstream: p.GetUpstream(),
		SystemFingerprint: p.GetSystemFingerprint(), ServiceTier: p.GetServiceTier(),
		MaxCompletionTokens: int(p.GetMaxCompletionTokens()),
		DroppedParameters:   p.GetDroppedParameters(), Extra: raw(p.GetExtraJson()),
	}
	if p.GetCreateTime() != nil {
		header.Created = p.GetCreateTime().AsTime()
	}
	for _, a := range p.GetAttempts() {
		attempt := Attempt{
			Upstream: a.GetUpstream(), KeyID: a.GetKeyId(), HTTPStatus: int(a.GetHttpStatus()),
			Duration: a.GetDuration().AsDuration(),
		}
		if a.GetErrorReason() != pb.ErrorReason_ERROR_REASON_UNSPECIFIED {
			attempt.Reason = Reason(strings.TrimPrefix(a.GetErrorReason().String(), "ERROR_REASON_"))
		}
		header.Attempts = append(header.Attempts, attempt)
	}
	return header
}

func usageOf(p *pb.Usage) Usage {
	if p == nil {
		return Usage{}
	}
	return Usage{
		PromptTokens:       int(p.PromptTokens),
		CompletionTokens:   int(p.CompletionTokens),
		TotalTokens:        int(p.TotalTokens),
		CachedPromptTokens: intOf(p.CachedPromptTokens),
		CacheWriteTokens:   intOf(p.CacheWriteTokens),
		ReasoningTokens:    intOf(p.ReasoningTokens),
		Estimated:          p.Estimated,
		Extra:              raw(p.ExtraJson),
	}
}

func intOf(p *int32) *int {
	if p == nil {
		return nil
	}
	return Ptr(int(*p))
}

func logprobs(list []*pb.TokenLogprob) []TokenLogprob {
	var tokens []TokenLogprob
	for _, p := range list {
		tokens = append(tokens, TokenLogprob{
			p.GetToken(), p.GetLogprob(), p.GetRawBytes(), logprobs(p.GetTop()),
		})
	}
	return tokens
}
