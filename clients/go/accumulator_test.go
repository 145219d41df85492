package tokenwire_test

import (
	"math/rand/v2"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	tokenwire "github.com/tokenwire/tokenwire/clients/go"
	pb "github.com/tokenwire/tokenwire/clients/go/tokenwire/v1"
)

func delta(d *pb.Delta) *pb.StreamChatResponse {
	return &pb.StreamChatResponse{Event: &pb.StreamChatResponse_Delta{Delta: d}}
}

func folded(events ...*pb.StreamChatResponse) *tokenwire.Accumulator {
	answer := &tokenwire.Accumulator{}
	for _, event := range events {
		answer.Add(event)
	}
	return answer
}

func TestFoldingEverything(t *testing.T) {
	answer := folded(
		&pb.StreamChatResponse{Event: &pb.StreamChatResponse_Header{Header: &pb.ResponseHeader{
			Id: "h", Model: "m", ExtraJson: `{"a": 1, "b": 12345678901234567890}`,
			Attempts: []*pb.UpstreamAttempt{
				{Upstream: "u", KeyId: "k1", HttpStatus: 429, ErrorReason: pb.ErrorReason_ERROR_REASON_RATE_LIMITED},
				{Upstream: "u", KeyId: "k2", HttpStatus: 200},
			},
		}}},
		delta(&pb.Delta{Reasoning: "hm", ExtraJson: `{"x": "a", "l": [1], "o": {"n": 1}}`}),
		delta(&pb.Delta{Content: "te", Logprobs: []*pb.TokenLogprob{{Token: "te", Logprob: -1, Top: []*pb.TokenLogprob{{Token: "t"}}}}}),
		delta(&pb.Delta{Content: "xt", Refusal: "no", Annotations: []*pb.Annotation{{EndOffset: 4, Url: "u"}},
			ExtraJson: `{"x": "b", "l": [2], "o": {"m": 2}, "n": null}`}),
		delta(&pb.Delta{ExtraJson: "not JSON"}),
		&pb.StreamChatResponse{Event: &pb.StreamChatResponse_Finish{Finish: &pb.Finish{
			FinishReason: pb.FinishReason_FINISH_REASON_LENGTH, FinishReasonRaw: "max_tokens", ExtraJson: `{"f": 1}`,
		}}},
	)
	equal(t, "complete", answer.IsComplete(), false)
	answer.Add(&pb.StreamChatResponse{Event: &pb.StreamChatResponse_Trailer{Trailer: &pb.StreamTrailer{
		Usage: &pb.Usage{PromptTokens: 1, ReasoningTokens: proto.Int32(2), ExtraJson: `{"u": 1}`}, ExtraJson: `{"a": 2}`,
	}}})
	equal(t, "complete", answer.IsComplete(), true)

	reply := answer.SoFar()
	choice := reply.First()
	equal(t, "extra of the header", string(reply.Header.Extra), `{"a":2,"b":12345678901234567890}`)
	equal(t, "attempts", reply.Header.Attempts[0].Reason, tokenwire.ReasonRateLimited)
	equal(t, "the one that answers", reply.Header.Attempts[1].Reason, "")
	equal(t, "texts", reply.Text()+"|"+reply.Reasoning()+"|"+reply.Refusal(), "text|hm|no")
	equal(t, "finish", string(choice.FinishReason)+" "+choice.FinishReasonRaw+string(choice.Extra), `length max_tokens{"f": 1}`)
	equal(t, "logprob", choice.Logprobs()[0].Top[0].Token, "t")
	equal(t, "annotation", choice.Message.Annotations[0], tokenwire.Annotation{End: 4, URL: "u"})
	equal(t, "extra", string(choice.Message.Extra), `{"l":[1,2],"n":null,"o":{"m":2,"n":1},"x":"ab"}`)
	equal(t, "usage", *reply.Usage.ReasoningTokens, 2)
	if reply.Usage.CachedPromptTokens != nil {
		t.Error("unset is not 0")
	}
	again := tokenwire.MessageFromProto(choice.Message.Proto())
	if !proto.Equal(again.Proto(), choice.Proto().GetMessage()) {
		t.Errorf("there and back: %v", again)
	}
}

func TestToolCallsAreAssembled(t *testing.T) {
	reply := folded(
		delta(&pb.Delta{ToolCalls: []*pb.ToolCallDelta{{Index: 1, Id: "b", Name: "g", Custom: true}}}),
		delta(&pb.Delta{ToolCalls: []*pb.ToolCallDelta{{Index: 0, Id: "a", Name: "f", Arguments: `{"x"`}}}),
		delta(&pb.Delta{ToolCalls: []*pb.ToolCallDelta{{Index: 1, Arguments: "free "}, {Index: 0, Arguments: ": 1}"}}}),
		// Some upstreams repeat id and name: the first ones count.
		delta(&pb.Delta{ToolCalls: []*pb.ToolCallDelta{{Index: 1, Id: "z", Name: "z", Arguments: "text"}}}),
	).SoFar()
	equal(t, "first", reply.ToolCalls()[0], tokenwire.ToolCall{ID: "a", Name: "f", RawArguments: `{"x": 1}`})
	equal(t, "second", reply.ToolCalls()[1], tokenwire.ToolCall{ID: "b", Name: "g", RawArguments: "free text", Custom: true})
	equal(t, "content", reply.First().Proto().GetMessage().Content, nil)
}

func TestAnyInterleavingOfChoicesGivesEachItsOwnText(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		answer := &tokenwire.Accumulator{}
		expected := map[int]string{}
		var halfway []*tokenwire.Reply
		var texts []string
		for range random.IntN(20) {
			index, text := random.IntN(3), strings.Repeat("é", random.IntN(4))
			answer.Add(delta(&pb.Delta{ChoiceIndex: int32(index), Content: text, Reasoning: text}))
			expected[index] += text
			halfway = append(halfway, answer.SoFar())
			texts = append(texts, answer.SoFar().Text())
		}
		for i, choice := range answer.SoFar().Choices {
			equal(t, "text", choice.Message.Content+"|"+choice.Message.Reasoning, expected[choice.Index]+"|"+expected[choice.Index])
			if i > 0 && answer.SoFar().Choices[i-1].Index >= choice.Index {
				t.Error("choices out of order")
			}
		}
		for i, reply := range halfway { // what was shown halfway does not change any more
			equal(t, "halfway", reply.Text(), texts[i])
		}
	}
}

func TestSnapshotsReplaceWhatCameBefore(t *testing.T) {
	answer := &tokenwire.Accumulator{}
	var texts []string
	for _, text := range []string{"Hel", "Hello", "Hello", "Other"} {
		event, ok := answer.Add(&pb.StreamChatResponse{Event: &pb.StreamChatResponse_Snapshot{Snapshot: &pb.Snapshot{
			Message: &pb.ChatMessage{Role: "assistant", Content: proto.String(text)},
		}}})
		equal(t, "kept", ok, true)
		texts = append(texts, event.Text)
		equal(t, "so far", answer.SoFar().Text(), text)
	}
	equal(t, "new", strings.Join(texts, "|"), "Hel|lo||Other")
}

func TestEventsToIgnore(t *testing.T) {
	newer := &pb.StreamChatResponse{}
	if err := proto.Unmarshal([]byte("\xfa\x01\x03new"), newer); err != nil { // field 31, not known yet
		t.Fatal(err)
	}
	answer := &tokenwire.Accumulator{}
	for _, event := range []*pb.StreamChatResponse{{}, newer, nil} {
		_, ok := answer.Add(event)
		equal(t, "kept", ok, false)
	}
	reply := answer.SoFar()
	equal(t, "empty", len(reply.Choices), 0)
	equal(t, "empty", reply.Text()+string(reply.FinishReason())+reply.Message().Role, "")
	equal(t, "empty", len(reply.First().Logprobs()), 0)
}

func TestFinishReasons(t *testing.T) {
	for number, expected := range map[pb.FinishReason]tokenwire.FinishReason{
		0: "", 1: tokenwire.FinishStop, 2: tokenwire.FinishLength, 3: tokenwire.FinishToolCalls,
		4: tokenwire.FinishContentFilter, 5: tokenwire.FinishOther,
		99: tokenwire.FinishOther, // newer than this package
	} {
		p := &pb.ChatResponse{Choices: []*pb.Choice{{FinishReason: number}}}
		equal(t, number.String(), tokenwire.ReplyFromProto(p).FinishReason(), expected)
	}
	equal(t, "all of them", len(pb.FinishReason_name), 6)
}

func TestArguments(t *testing.T) {
	for text, expected := range map[string]int{"": 0, " \n": 0, "{}": 0, ` {"a": 7}`: 7, `{"a": 9007199254740993}`: 9007199254740993} {
		type a struct{ A int }
		equal(t, text, must[a](t)(tokenwire.DecodeArguments[a](tokenwire.ToolCall{RawArguments: text})).A, expected)
	}
	for text, expected := range map[string]string{
		`{"a": `:                    `arguments of the call of "f" (c1): unexpected end of JSON input: "{\"a\":"`,
		`[1]`:                       `arguments of the call of "f" (c1) are no JSON object: "[1]"`,
		`null`:                      `are no JSON object: "null"`,
		`{} {}`:                     `after top-level value`,
		strings.Repeat("[", 100000): `exceeded max depth`,
	} {
		err := tokenwire.ToolCall{ID: "c1", Name: "f", RawArguments: text}.Decode(&map[string]any{})
		if err == nil || !strings.Contains(err.Error(), expected) || len(err.Error()) > 300 {
			t.Errorf("%.20s: got %v", text, err)
		}
	}
	if err := (tokenwire.ToolCall{Custom: true}).Decode(&map[string]any{}); err == nil {
		t.Error("the input of a custom tool is no JSON")
	}
	if _, err := (tokenwire.ToolCall{}).AnswerJSON(func() {}); err == nil {
		t.Error("a function is no JSON")
	}
	answer := must[tokenwire.Message](t)(tokenwire.ToolCall{ID: "c1"}.AnswerJSON(map[string]string{"ö": "<&>"}))
	equal(t, "answer", answer.Role+answer.ToolCallID+answer.Content, `toolc1{"ö":"<&>"}`)
}
