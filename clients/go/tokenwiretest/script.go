package tokenwiretest

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"

	tokenwire "github.com/tokenwire/tokenwire/clients/go"
	pb "github.com/tokenwire/tokenwire/clients/go/tokenwire/v1"
)

// A Part is a piece of a scripted answer: some events of the stream. Whole answers are folded
// from the same parts.
type Part []*pb.StreamChatResponse

// Text is text of the first choice, one delta for each string.
func Text(deltas ...string) Part {
	var part Part
	for _, text := range deltas {
		part = append(part, Delta(&pb.Delta{Content: text})...)
	}
	return part
}

// Reasoning is what the model shows of its reasoning, one delta for each string.
func Reasoning(deltas ...string) Part {
	var part Part
	for _, text := range deltas {
		part = append(part, Delta(&pb.Delta{Reasoning: text})...)
	}
	return part
}

// ToolCall is a call of a function, with the id "call_1"; arguments is text as it is, or a value
// to marshal. For several calls in one answer see ToolCalls.
func ToolCall(name string, arguments any) Part {
	return ToolCalls(Call{Name: name, Arguments: arguments})
}

// A Call is one of several that a scripted answer wants made.
type Call struct {
	ID        string // "call_" and its position from 1 when empty
	Name      string
	Arguments any // text as it is, or a value to marshal
}

// ToolCalls are several calls of functions, each in two deltas, as providers cut them.
func ToolCalls(calls ...Call) Part {
	var part Part
	for i, call := range calls {
		text, ok := call.Arguments.(string)
		if !ok {
			encoded, err := json.Marshal(call.Arguments)
			if err != nil {
				panic("tokenwiretest: arguments: " + err.Error())
			}
			text = string(encoded)
		}
		id := call.ID
		if id == "" {
			id = fmt.Sprintf("call_%d", i+1)
		}
		index, cut := int32(i), strings.IndexByte(text, ':')+1 // ASCII, so never within a character
		part = append(part, Delta(&pb.Delta{ToolCalls: []*pb.ToolCallDelta{
			{Index: index, Id: id, Name: call.Name, Arguments: text[:cut]},
		}})...)
		part = append(part, Delta(&pb.Delta{ToolCalls: []*pb.ToolCallDelta{
			{Index: index, Arguments: text[cut:]},
		}})...)
	}
	return part
}

// Delta is any delta of the contract.
func Delta(delta *pb.Delta) Part {
	return Part{{Event: &pb.StreamChatResponse_Delta{Delta: delta}}}
}

// Heartbeat is an empty message, which clients pass over.
func Heartbeat() Part { return Part{{}} }

// Failure is how a scripted call fails.
type Failure struct {
	// Reason; "" for a status without details, as a proxy sends.
	Reason tokenwire.Reason
	// Code is the reason's own unless given; Unavailable without a reason.
	Code codes.Code
	// Message for people.
	Message string
	// After are the parts that a stream has before it fails.
	After []Part
	// RetryAfter, unless 0, is the delay of a RetryInfo.
	RetryAfter time.Duration
	// FieldViolations are those of a BadRequest.
	FieldViolations []tokenwire.FieldViolation
	// Metadata is that of the ErrorInfo.
	Metadata map[string]string
	// Pushback is what gRPC's own retries are told: a delay, or no retry if negative. Unless
	// given it is the gateway's way: nothing where another instance may help, else RetryAfter,
	// else no retry.
	Pushback *time.Duration
}

// reasonCodes are the status codes that go with the reasons, as error_reason.proto says.
var reasonCodes = map[tokenwire.Reason]codes.Code{
	tokenwire.ReasonInvalidRequest:              codes.InvalidArgument,
	tokenwire.ReasonContextLengthExceeded:       codes.InvalidArgument,
	tokenwire.ReasonUnsupportedParameter:        codes.InvalidArgument,
	tokenwire.ReasonUnknownRole:                 codes.InvalidArgument,
	tokenwire.ReasonRequestTooLarge:             codes.ResourceExhausted,
	tokenwire.ReasonContentFiltered:             codes.InvalidArgument,
	tokenwire.ReasonModelNotFound:               codes.NotFound,
	tokenwire.ReasonCallerUnauthenticated:       codes.Unauthenticated,
	tokenwire.ReasonCallerForbidden:             codes.PermissionDenied,
	tokenwire.ReasonCallerQuotaExceeded:         codes.ResourceExhausted,
	tokenwire.ReasonRateLimited:                 codes.ResourceExhausted,
	tokenwire.ReasonUpstreamQuotaExhausted:      codes.ResourceExhausted,
	tokenwire.ReasonUpstreamCredentialsRejected: codes.FailedPrecondition,
	tokenwire.ReasonUpstreamAccessDenied:        codes.FailedPrecondition,
	tokenwire.ReasonUpstreamUnreachable:         codes.Unavailable,
	tokenwire.ReasonUpstreamTimeout:             codes.Unavailable,
	tokenwire.ReasonUpstreamOverloaded:          codes.Unavailable,
	tokenwire.ReasonUpstreamError:               codes.Unavailable,
	tokenwire.ReasonUpstreamProtocolError:       codes.Unavailable,
	tokenwire.ReasonUpstreamStreamInterrupted:   codes.Unavailable,
	tokenwire.ReasonGatewayOverloaded:           codes.Unavailable,
	tokenwire.ReasonGatewayDraining:             codes.Unavailable,
	tokenwire.ReasonDeadlineExceeded:            codes.DeadlineExceeded,
	tokenwire.ReasonCancelled:                   codes.Canceled,
	tokenwire.ReasonInternal:                    codes.Internal,
	tokenwire.ReasonCallerStalled:               codes.Aborted,
	tokenwire.ReasonTokenizerUnavailable:        codes.FailedPrecondition,
}

// Code returns the status code that goes with a reason, and false for one that is not of the
// contract.
func Code(reason tokenwire.Reason) (codes.Code, bool) {
	code, known := reasonCodes[reason]
	return code, known
}

func (f Failure) status() *statuspb.Status {
	code := f.Code
	if code == codes.OK {
		known := f.Reason == ""
		if code = codes.Unavailable; !known {
			code, known = reasonCodes[f.Reason]
		}
		if !known {
			panic(fmt.Sprintf("tokenwiretest: no such reason: %q", string(f.Reason)))
		}
	}
	status := &statuspb.Status{Code: int32(code), Message: f.Message}
	if status.Message == "" {
		status.Message = "scripted by the test"
	}
	add := func(detail proto.Message) {
		packed, err := anypb.New(detail)
		if err != nil {
			panic("tokenwiretest: " + err.Error()) // metadata that is not UTF-8
		}
		status.Details = append(status.Details, packed)
	}
	if f.Reason != "" {
		add(&errdetails.ErrorInfo{Reason: string(f.Reason), Domain: "tokenwire", Metadata: f.Metadata})
	}
	if f.RetryAfter > 0 {
		add(&errdetails.RetryInfo{RetryDelay: durationpb.New(f.RetryAfter)})
	}
	if len(f.FieldViolations) > 0 {
		refused := &errdetails.BadRequest{}
		for _, v := range f.FieldViolations {
			refused.FieldViolations = append(refused.FieldViolations,
				&errdetails.BadRequest_FieldViolation{Field: v.Field, Description: v.Description})
		}
		add(refused)
	}
	return status
}

// pushback returns the value of the trailer grpc-retry-pushback-ms; "" for none.
func (f Failure) pushback() string {
	delay := -time.Millisecond
	switch {
	case f.Pushback != nil:
		delay = max(*f.Pushback, delay)
	case f.Reason == "", f.Reason == tokenwire.ReasonGatewayOverloaded, f.Reason == tokenwire.ReasonGatewayDraining:
		return "" // the gateway leaves these to the client's retries
	case f.RetryAfter > 0:
		delay = f.RetryAfter
	}
	return fmt.Sprint(delay.Milliseconds())
}

// script is what one call is answered with.
type script struct {
	events       []*pb.StreamChatResponse
	kind         ending
	failure      Failure
	finishReason tokenwire.FinishReason
	usage        *tokenwire.Usage
}

type ending int

const (
	whole ending = iota
	failing
	cut
	hanging
)

func flat(parts []Part) []*pb.StreamChatResponse {
	var events []*pb.StreamChatResponse
	for _, part := range parts {
		events = append(events, part...)
	}
	return events
}

// all returns the events of an answer as the gateway would send them, up to its ending.
func (s script) all(id string, chat *pb.ChatRequest) []*pb.StreamChatResponse {
	header := &pb.ResponseHeader{Id: id, Model: chat.GetModel(), Upstream: "fake"}
	events := []*pb.StreamChatResponse{{Event: &pb.StreamChatResponse_Header{Header: header}}}
	events = append(events, s.events...)
	if s.kind != whole {
		return events
	}
	open := map[int32]bool{}
	highest, calls, words := int32(-1), false, 0
	for _, event := range s.events {
		if delta := event.GetDelta(); delta != nil {
			open[delta.GetChoiceIndex()] = true
			highest = max(highest, delta.GetChoiceIndex())
			calls = calls || len(delta.GetToolCalls()) > 0
			words += len(strings.Fields(delta.GetContent()))
		}
	}
	if len(open) == 0 {
		open[0], highest = true, 0
	}
	for _, event := range s.events {
		if finish := event.GetFinish(); finish != nil {
			delete(open, finish.GetChoiceIndex())
		}
	}
	why := s.finishReason
	if why == "" {
		why = tokenwire.FinishStop
		if calls {
			why = tokenwire.FinishToolCalls
		}
	}
	for index := range highest + 1 {
		if open[index] {
			events = append(events, &pb.StreamChatResponse{Event: &pb.StreamChatResponse_Finish{Finish: &pb.Finish{
				ChoiceIndex:     index,
				FinishReason:    pb.FinishReason(pb.FinishReason_value["FINISH_REASON_"+strings.ToUpper(string(why))]),
				FinishReasonRaw: string(why),
			}}})
		}
	}
	return append(events, &pb.StreamChatResponse{
		Event: &pb.StreamChatResponse_Trailer{Trailer: &pb.StreamTrailer{Usage: s.used(chat, words)}},
	})
}

// used returns the usage as scripted, else words as tokens.
func (s script) used(chat *pb.ChatRequest, words int) *pb.Usage {
	if s.usage != nil {
		int32Of := func(n *int) *int32 {
			if n == nil {
				return nil
			}
			return proto.Int32(int32(*n))
		}
		return &pb.Usage{
			PromptTokens:       int32(s.usage.PromptTokens),
			CompletionTokens:   int32(s.usage.CompletionTokens),
			TotalTokens:        int32(s.usage.TotalTokens),
			CachedPromptTokens: int32Of(s.usage.CachedPromptTokens),
			CacheWriteTokens:   int32Of(s.usage.CacheWriteTokens),
			ReasoningTokens:    int32Of(s.usage.ReasoningTokens),
			Estimated:          s.usage.Estimated,
			ExtraJson:          string(s.usage.Extra),
		}
	}
	prompt := 0
	for _, message := range chat.GetMessages() {
		prompt += len(strings.Fields(message.GetContent()))
	}
	return &pb.Usage{
		PromptTokens: int32(prompt), CompletionTokens: int32(words), TotalTokens: int32(prompt + words),
		Estimated: true,
	}
}
