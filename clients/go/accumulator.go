package tokenwire

import (
	"encoding/json"
	"maps"
	"slices"
	"strings"

	pb "github.com/tokenwire/tokenwire/clients/go/tokenwire/v1"
)

// EventKind is what an [Event] is about.
type EventKind string

// Kinds of events, in the order in which a stream has them.
const (
	EventHeader   EventKind = "header"   // once, first
	EventDelta    EventKind = "delta"    // what is new
	EventSnapshot EventKind = "snapshot" // all so far, with Cumulative
	EventFinish   EventKind = "finish"   // once for each choice
	EventTrailer  EventKind = "trailer"  // once, last
)

// Event is one event of a stream.
type Event struct {
	Kind EventKind
	// ChoiceIndex is the choice it belongs to; 0 for header and trailer.
	ChoiceIndex int
	// Text is new text of the answer, in either mode; often "".
	Text string
	// Reasoning is new text of the reasoning; "" with Cumulative, where the stream has it.
	Reasoning string

	proto *pb.StreamChatResponse
}

// Proto returns the event as the contract has it; do not change it.
func (e Event) Proto() *pb.StreamChatResponse { return e.proto }

// hasToken tells whether the model's first output is in the event.
func (e Event) hasToken() bool {
	delta := e.proto.GetDelta()
	return e.Text != "" || delta.GetReasoning() != "" || delta.GetRefusal() != "" ||
		len(delta.GetToolCalls()) > 0
}

// Accumulator folds the events of one stream into the answer so far. A [Stream] holds one; use it
// by itself for events that came another way. The zero value is ready; it is not for several
// goroutines at once.
type Accumulator struct {
	header  *pb.ResponseHeader
	trailer *pb.StreamTrailer
	choices map[int32]*growing
}

// Add folds one event in. It returns false for one to ignore: a heartbeat, or an event newer than
// this package.
func (a *Accumulator) Add(p *pb.StreamChatResponse) (Event, bool) {
	event := Event{proto: p}
	switch e := p.GetEvent().(type) {
	case *pb.StreamChatResponse_Header:
		event.Kind, a.header = EventHeader, e.Header
	case *pb.StreamChatResponse_Delta:
		event.Kind, event.ChoiceIndex = EventDelta, int(e.Delta.GetChoiceIndex())
		event.Text, event.Reasoning = e.Delta.GetContent(), e.Delta.GetReasoning()
		a.choice(e.Delta.GetChoiceIndex()).add(e.Delta)
	case *pb.StreamChatResponse_Snapshot:
		event.Kind, event.ChoiceIndex = EventSnapshot, int(e.Snapshot.GetChoiceIndex())
		choice := a.choice(e.Snapshot.GetChoiceIndex())
		event.Text = strings.TrimPrefix(e.Snapshot.GetMessage().GetContent(), choice.whole.GetContent())
		choice.whole = e.Snapshot.GetMessage()
	case *pb.StreamChatResponse_Finish:
		event.Kind, event.ChoiceIndex = EventFinish, int(e.Finish.GetChoiceIndex())
		a.choice(e.Finish.GetChoiceIndex()).finish = e.Finish
	case *pb.StreamChatResponse_Trailer:
		event.Kind, a.trailer = EventTrailer, e.Trailer
	default:
		return Event{}, false
	}
	return event, true
}

// IsComplete tells whether the trailer has arrived: without it the answer is only a part.
func (a *Accumulator) IsComplete() bool { return a.trailer != nil }

// SoFar returns what has arrived, see [Accumulator.IsComplete]. It does not change any more, and
// costs little however long the text is.
func (a *Accumulator) SoFar() *Reply { return a.soFar("") }

func (a *Accumulator) soFar(requestID string) *Reply {
	response := &pb.ChatResponse{Header: a.header, Usage: a.trailer.GetUsage()}
	if extra := a.trailer.GetExtraJson(); extra != "" {
		// What a whole answer has in its header, a stream learns when that has gone.
		h := a.header
		response.Header = &pb.ResponseHeader{
			Id: h.GetId(), Model: h.GetModel(), Upstream: h.GetUpstream(), CreateTime: h.GetCreateTime(),
			SystemFingerprint: h.GetSystemFingerprint(), ServiceTier: h.GetServiceTier(),
			MaxCompletionTokens: h.GetMaxCompletionTokens(), DroppedParameters: h.GetDroppedParameters(),
			Attempts: h.GetAttempts(), ExtraJson: mergedExtra(h.GetExtraJson(), extra),
		}
	}
	for _, index := range slices.Sorted(maps.Keys(a.choices)) {
		response.Choices = append(response.Choices, a.choices[index].proto(index))
	}
	return newReply(response, requestID)
}

func (a *Accumulator) choice(index int32) *growing {
	if a.choices == nil {
		a.choices = map[int32]*growing{}
	}
	if a.choices[index] == nil {
		a.choices[index] = &growing{}
	}
	return a.choices[index]
}

// growing is one choice while it grows. Builders, so that n deltas cost n and not n squared, and
// reading them half-way costs nothing.
type growing struct {
	content, reasoning, refusal strings.Builder
	calls                       map[int32]*growingCall
	logprobs                    []*pb.TokenLogprob
	annotations                 []*pb.Annotation
	extra                       map[string]any
	whole                       *pb.ChatMessage // the last snapshot
	finish                      *pb.Finish
}

type growingCall struct {
	id, name  string
	custom    bool
	arguments strings.Builder
}

func (g *growing) add(delta *pb.Delta) {
	g.content.WriteString(delta.GetContent())
	g.reasoning.WriteString(delta.GetReasoning())
	g.refusal.WriteString(delta.GetRefusal())
	for _, part := range delta.GetToolCalls() {
		if g.calls == nil {
			g.calls = map[int32]*growingCall{}
		}
		call := g.calls[part.GetIndex()]
		if call == nil {
			call = &growingCall{}
			g.calls[part.GetIndex()] = call
		}
		// Some upstreams repeat id and name: the first ones count.
		call.id = or(call.id, part.GetId())
		call.name = or(call.name, part.GetName())
		call.custom = call.custom || part.GetCustom()
		call.arguments.WriteString(part.GetArguments())
	}
	g.logprobs = append(g.logprobs, delta.GetLogprobs()...)
	g.annotations = append(g.annotations, delta.GetAnnotations()...)
	if extra := extraOf(delta.GetExtraJson()); len(extra) > 0 {
		g.extra = appended(g.extra, extra).(map[string]any) // of objects it makes an object
	}
}

func (g *growing) proto(index int32) *pb.Choice {
	message := g.whole
	if message == nil {
		message = g.message()
	}
	return &pb.Choice{
		Index:           index,
		Message:         message,
		FinishReason:    g.finish.GetFinishReason(),
		FinishReasonRaw: g.finish.GetFinishReasonRaw(),
		Logprobs:        slices.Clip(g.logprobs),
		ExtraJson:       g.finish.GetExtraJson(),
	}
}

func (g *growing) message() *pb.ChatMessage {
	message := &pb.ChatMessage{Role: "assistant", Annotations: slices.Clip(g.annotations)}
	for _, i := range slices.Sorted(maps.Keys(g.calls)) {
		call := g.calls[i]
		message.ToolCalls = append(message.ToolCalls,
			ToolCall{call.id, call.name, call.arguments.String(), call.custom}.Proto())
	}
	if g.refusal.Len() > 0 {
		message.Refusal = Ptr(g.refusal.String())
	}
	if g.reasoning.Len() > 0 {
		message.Reasoning = Ptr(g.reasoning.String())
	}
	if g.content.Len() > 0 || len(g.calls) == 0 && g.refusal.Len() == 0 {
		// A turn that only calls tools has null content, not an empty one.
		message.Content = Ptr(g.content.String())
	}
	if len(g.extra) > 0 {
		message.ExtraJson = jsonText(g.extra)
	}
	return message
}

// appended has the semantics of deltas for JSON that nobody has modelled: text and lists grow,
// objects merge.
func appended(before, more any) any {
	switch before := before.(type) {
	case map[string]any:
		if more, ok := more.(map[string]any); ok {
			merged := make(map[string]any, len(before)+len(more))
			maps.Copy(merged, before)
			for key, value := range more {
				if old, has := merged[key]; has {
					value = appended(old, value)
				}
				merged[key] = value
			}
			return merged
		}
	case string:
		if more, ok := more.(string); ok {
			return before + more
		}
	case []any:
		if more, ok := more.([]any); ok {
			return append(slices.Clip(before), more...)
		}
	}
	return more
}

// extraOf reads fields that nobody has modelled; they are a courtesy, and must not cost the answer.
func extraOf(text string) map[string]any {
	if text == "" {
		return nil
	}
	var fields map[string]any
	decoder := json.NewDecoder(strings.NewReader(text))
	decoder.UseNumber() // numbers go back as they came
	if decoder.Decode(&fields) != nil {
		return nil
	}
	return fields
}

func mergedExtra(before, after string) string {
	fields := extraOf(before)
	if fields == nil {
		fields = map[string]any{}
	}
	maps.Copy(fields, extraOf(after))
	return jsonText(fields)
}

func jsonText(fields map[string]any) string {
	text, err := marshal(fields)
	if err != nil {
		return "" // what was read as JSON can be written as JSON
	}
	return string(text)
}
