package tokenwire_test

import (
	"encoding/json"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	tokenwire "github.com/tokenwire/tokenwire/clients/go"
	pb "github.com/tokenwire/tokenwire/clients/go/tokenwire/v1"
)

// everything sets every field there is.
func everything() tokenwire.Request {
	ptr := tokenwire.Ptr[float64]
	return tokenwire.Request{
		Model: "m",
		Messages: []tokenwire.Message{
			tokenwire.System("s"),
			tokenwire.UserParts(
				tokenwire.Text("t"), tokenwire.ImageURL("https://a/b.png"), tokenwire.ImageData("image/png", []byte{0}),
				tokenwire.Part{Audio: &tokenwire.Media{Data: []byte{1}, MediaType: "audio/wav"}},
				tokenwire.Part{Video: &tokenwire.Media{FileID: "f", Detail: "low"}},
				tokenwire.Part{File: &tokenwire.Media{URL: "data:,x", Filename: "n"}, Extra: json.RawMessage(`{"c": 1}`)},
				tokenwire.Part{Raw: json.RawMessage(`{"type": "new"}`)},
			),
			{
				Role: "assistant", Name: "n", Reasoning: "r", Refusal: "f",
				ToolCalls: []tokenwire.ToolCall{
					{ID: "1", Name: "f", RawArguments: "{}"}, {ID: "2", Name: "g", RawArguments: "x", Custom: true},
				},
				Annotations: []tokenwire.Annotation{{Start: 1, End: 2, URL: "u", Title: "t"}},
				Extra:       json.RawMessage(`{"e": 1}`),
			},
			tokenwire.ToolCall{ID: "1"}.Answer("a"),
		},
		Prompt: "p", Temperature: ptr(0), TopP: ptr(0.5), TopK: tokenwire.Ptr(1), MinP: ptr(0),
		MaxCompletionTokens: tokenwire.Ptr(2), Stop: []string{"s"}, FrequencyPenalty: ptr(0),
		PresencePenalty: ptr(0), RepetitionPenalty: ptr(1), Seed: tokenwire.Ptr(int64(1) << 40),
		ChoiceCount: tokenwire.Ptr(1), Logprobs: tokenwire.Ptr(false), TopLogprobs: tokenwire.Ptr(0),
		LogitBias: map[int]float64{50256: -100}, ReasoningEffort: "low", EnableThinking: tokenwire.Ptr(false),
		Verbosity: "low", ParallelToolCalls: tokenwire.Ptr(false),
		Tools: []tokenwire.Tool{
			{Name: "f", Description: "d", Parameters: map[string]any{"type": "object"}, Strict: tokenwire.Ptr(true)},
			{Name: "g", Custom: true, Description: "d", InputFormat: `{"type": "text"}`},
			{Raw: json.RawMessage(`{"type": "web_search"}`)},
		},
		ToolChoice: tokenwire.ToolChoiceRequired, ToolNames: []string{"f"},
		Format: &tokenwire.Format{Schema: `{}`, Name: "n", Description: "d", Strict: tokenwire.Ptr(false)},
		RoleTemplates: []tokenwire.RoleTemplate{
			{Role: "environment", APIRole: "system", Begin: "b", End: "e", FallbackRole: "system"},
		},
		EndUserID: "e", PromptCacheKey: "c", ServiceTier: "flex", DropUnsupported: true,
		Labels: map[string]string{"a": "b"}, ExtraBody: map[string]any{"x": 1},
	}
}

// A field of the contract that no field of Request reaches fails this test.
func TestEveryFieldOfTheContractCanBeSet(t *testing.T) {
	request := must[*pb.ChatRequest](t)(everything().ChatProto())
	seen := map[protoreflect.FullName]bool{}
	var walk func(protoreflect.Message)
	walk = func(m protoreflect.Message) {
		m.Range(func(field protoreflect.FieldDescriptor, value protoreflect.Value) bool {
			seen[field.FullName()] = true
			switch {
			case field.IsMap() || field.Kind() != protoreflect.MessageKind:
			case field.IsList():
				for i := range value.List().Len() {
					walk(value.List().Get(i).Message())
				}
			default:
				walk(value.Message())
			}
			return true
		})
	}
	walk(request.ProtoReflect())
	known := map[protoreflect.FullName]bool{}
	var check func(protoreflect.MessageDescriptor)
	check = func(m protoreflect.MessageDescriptor) {
		if known[m.FullName()] {
			return
		}
		known[m.FullName()] = true
		for i := range m.Fields().Len() {
			field := m.Fields().Get(i)
			name := strings.TrimPrefix(string(field.FullName()), "tokenwire.v1.")
			// Plain text is the default, and what the other formats are instead of.
			if !seen[field.FullName()] && !strings.HasPrefix(name, "ResponseFormat.") {
				t.Errorf("nothing sets %s", name)
			}
			if field.Kind() == protoreflect.MessageKind && !field.IsMap() && seen[field.FullName()] {
				check(field.Message())
			}
		}
	}
	check(request.ProtoReflect().Descriptor())

	for _, message := range everything().Messages { // what goes there comes back
		if again := tokenwire.MessageFromProto(message.Proto()).Proto(); !proto.Equal(again, message.Proto()) {
			t.Errorf("got %v, expected %v", again, message.Proto())
		}
	}
}

func TestARequestInWords(t *testing.T) {
	for expected, request := range map[string]tokenwire.Request{
		`{"model":"m","messages":[{"role":"user","content":"Hi"}]}`: hi,
		`{"model":"m","messages":[{"role":"assistant","content":""}]}`: {
			Model: "m", Messages: []tokenwire.Message{tokenwire.Assistant("")},
		},
		`{"model":"m","messages":[{"role":"user","content":"Hi"}],"responseFormat":{"jsonObject":{}}}`: {
			Model: "m", Prompt: "Hi", Format: tokenwire.JSONObject(),
		},
		`{"model":"m","messages":[{"role":"user","content":"Hi"}],"responseFormat":{"rawJson":"{}"}}`: {
			Model: "m", Prompt: "Hi", Format: &tokenwire.Format{Raw: json.RawMessage("{}")},
		},
		`{"model":"m","messages":[{"role":"user","content":"Hi"}],"extraBodyJson":"{\"b\": 1, \"a\": 2}"}`: {
			Model: "m", Prompt: "Hi", ExtraBody: `{"b": 1, "a": 2}`, // keys keep their order
		},
	} {
		wanted := &pb.ChatRequest{}
		if err := protojson.Unmarshal([]byte(expected), wanted); err != nil {
			t.Fatal(err)
		}
		if got := must[*pb.ChatRequest](t)(request.ChatProto()); !proto.Equal(got, wanted) {
			t.Errorf("got %v, expected %v", got, wanted)
		}
	}
}

func TestAReadyRequestIsCopiedAndOptionsReplace(t *testing.T) {
	ready := must[*pb.ChatRequest](t)(everything().ChatProto())
	before := proto.Clone(ready)
	same := must[*pb.ChatRequest](t)(tokenwire.Request{Proto: ready}.ChatProto())
	if !proto.Equal(same, before) {
		t.Errorf("got %v", same)
	}
	other := must[*pb.ChatRequest](t)(tokenwire.Request{
		Proto: ready, Model: "other", Prompt: "more", Temperature: tokenwire.Ptr(1.0), Stop: []string{},
		Tools: []tokenwire.Tool{{Name: "only"}}, ToolChoice: tokenwire.ToolChoiceNone,
	}.ChatProto())
	equal(t, "model", other.GetModel(), "other")
	equal(t, "temperature", other.GetParams().GetTemperature(), 1)
	equal(t, "kept", other.GetParams().GetTopP(), 0.5)
	equal(t, "stop", len(other.GetParams().GetStop()), 0)
	equal(t, "tools", len(other.GetTools()), 1)
	equal(t, "messages", len(other.GetMessages()), len(ready.GetMessages())+1)
	equal(t, "mode", other.GetToolChoice().GetMode(), pb.ToolChoice_MODE_NONE)
	if !proto.Equal(ready, before) {
		t.Error("the request of the caller has changed")
	}
	// A prompt must not be written into what the caller's slice has room for.
	room := append(make([]tokenwire.Message, 0, 2), tokenwire.User("a"))
	must[*pb.ChatRequest](t)(tokenwire.Request{Model: "m", Messages: room, Prompt: "b"}.ChatProto())
	equal(t, "beyond the slice", room[:2][1].Content, "")
}

func TestRequestsThatMakeNoSense(t *testing.T) {
	user := func(parts ...tokenwire.Part) tokenwire.Request {
		return tokenwire.Request{Model: "m", Messages: []tokenwire.Message{tokenwire.UserParts(parts...)}}
	}
	with := func(change func(*tokenwire.Request)) tokenwire.Request {
		request := hi
		change(&request)
		return request
	}
	for expected, request := range map[string]tokenwire.Request{
		"messages: expected Prompt": {Model: "m"},
		"model: expected":           {Prompt: "Hi"},
		"messages[1].role: ":        {Model: "m", Messages: []tokenwire.Message{tokenwire.User("a"), {Content: "b"}}},
		"messages[0].content: expected only one": {Model: "m", Messages: []tokenwire.Message{
			{Role: "user", Content: "a", Parts: []tokenwire.Part{tokenwire.Text("b")}},
		}},
		"messages[0].content: expected UTF-8": with(func(r *tokenwire.Request) { r.Prompt = "a\xff" }),
		"messages[0].extra_json: expected a JSON object": {Model: "m", Messages: []tokenwire.Message{
			{Role: "user", Extra: json.RawMessage("[]")},
		}},
		"messages[0].parts[0]: expected only one": user(tokenwire.Part{Text: "a", Image: &tokenwire.Media{URL: "u"}}),
		"messages[0].parts[1]: expected one of Data, URL and FileID": user(
			tokenwire.Text("a"), tokenwire.Part{Image: &tokenwire.Media{}}),
		"messages[0].parts[0].media_type: missing": user(tokenwire.ImageData("", []byte{1})),
		"messages[0].annotations[0]: 4294967296 does not fit": {Model: "m", Messages: []tokenwire.Message{
			{Role: "assistant", Annotations: []tokenwire.Annotation{{End: 1 << 32}}},
		}},
		"params.top_k: 4294967296 does not fit": with(func(r *tokenwire.Request) { r.TopK = tokenwire.Ptr(1 << 32) }),
		"params.logit_bias: ": with(func(r *tokenwire.Request) {
			r.LogitBias = map[int]float64{1 << 40: 1}
		}),
		"params.stop: expected UTF-8": with(func(r *tokenwire.Request) { r.Stop = []string{"a", "\xff"} }),
		"labels: expected UTF-8": with(func(r *tokenwire.Request) {
			r.Labels = map[string]string{"a\xc3": "\xa9"}
		}),
		"tools[0].name: missing": with(func(r *tokenwire.Request) { r.Tools = []tokenwire.Tool{{}} }),
		"tools[1].parameters_schema_json: expected a JSON object, got \"nonsense\"": with(func(r *tokenwire.Request) {
			r.Tools = []tokenwire.Tool{{Name: "a"}, {Name: "b", Parameters: "nonsense"}}
		}),
		"tools[0].parameters_schema_json: no JSON: ": with(func(r *tokenwire.Request) {
			r.Tools = []tokenwire.Tool{{Name: "a", Parameters: func() {}}}
		}),
		"tools[0]: a custom tool": with(func(r *tokenwire.Request) {
			r.Tools = []tokenwire.Tool{{Name: "a", Custom: true, Parameters: "{}"}}
		}),
		"tools[0]: only a custom tool": with(func(r *tokenwire.Request) {
			r.Tools = []tokenwire.Tool{{Name: "a", InputFormat: "{}"}}
		}),
		`tool_choice: expected "auto", "none" or "required", got "any"`: with(func(r *tokenwire.Request) {
			r.ToolChoice = "any"
		}),
		"response_format.json_schema.schema_json: missing": with(func(r *tokenwire.Request) {
			r.Format = tokenwire.JSONSchema("")
		}),
		"response_format: expected a JSON object": with(func(r *tokenwire.Request) {
			r.Format = &tokenwire.Format{Raw: json.RawMessage("1")}
		}),
		"role_templates[0].role: missing": with(func(r *tokenwire.Request) {
			r.RoleTemplates = []tokenwire.RoleTemplate{{Begin: "a"}}
		}),
		"extra_body_json: expected a JSON object, got \"[1]\"": with(func(r *tokenwire.Request) { r.ExtraBody = []int{1} }),
	} {
		_, err := request.ChatProto()
		failed := failure(t, err)
		if !strings.HasPrefix(failed.Message, expected) {
			t.Errorf("got %q, expected %q", failed.Message, expected)
		}
		equal(t, "reason", failed.Reason, tokenwire.ReasonInvalidRequest)
		equal(t, "said once", failed.Error(), "INVALID_REQUEST: "+failed.Message)
	}
}
