package tokenwire

import (
	"encoding/json"
	"fmt"
	"math"

	"google.golang.org/protobuf/proto"

	pb "github.com/tokenwire/tokenwire/clients/go/tokenwire/v1"
)

// Request is one question to a model. Only a model and a prompt or messages are required. What is
// a pointer or a slice means the model's own default when nil; [Ptr] makes pointers:
//
//	tokenwire.Request{Model: "gpt-4o-mini", Prompt: "Hi", Temperature: tokenwire.Ptr(0.0)}
//
// Ranges are the gateway's to judge, which knows the model and names the field.
type Request struct {
	// Model is a name or alias that [Client.Models] lists.
	Model string
	// Messages of the conversation, oldest first.
	Messages []Message
	// Prompt, unless "", is one more message of the user after Messages.
	Prompt string

	Temperature         *float64        // 0 is the most deterministic; [0, 2]
	TopP                *float64        // (0, 1]
	TopK                *int            // 1 or more; not every upstream takes it
	MinP                *float64        // [0, 1]; not every upstream takes it
	MaxCompletionTokens *int            // reasoning included; lowered to the model's cap
	Stop                []string        // where to stop; never part of the answer
	FrequencyPenalty    *float64        // 0 is neutral; [-2, 2]
	PresencePenalty     *float64        // 0 is neutral; [-2, 2]
	RepetitionPenalty   *float64        // 1 is neutral; above 0; not every upstream takes it
	Seed                *int64          // best-effort determinism
	ChoiceCount         *int            // answers to generate (n elsewhere); [1, 128]
	Logprobs            *bool           // return log probabilities
	TopLogprobs         *int            // alternatives per token; [0, 20]; needs Logprobs
	LogitBias           map[int]float64 // token id to bias; [-100, 100]
	ReasoningEffort     string          // "low", "medium", "high", ...
	EnableThinking      *bool           // where the model allows it
	Verbosity           string          // "low", "medium", "high"
	ParallelToolCalls   *bool           // several calls in one turn

	// Tools that the model may call.
	Tools []Tool
	// ToolChoice is whether it may or must.
	ToolChoice ToolChoice
	// ToolNames, if there are any, are the only tools it may call; one name with
	// ToolChoiceRequired forces that tool.
	ToolNames []string
	// Format of the answer: [JSONSchema], [JSONObject]; nil is text.
	Format *Format
	// RoleTemplates replace the model's configured ones.
	RoleTemplates []RoleTemplate
	// EndUserID is a stable pseudonym of whom this is for.
	EndUserID string
	// PromptCacheKey is a hint which calls share a beginning.
	PromptCacheKey string
	// ServiceTier is "auto", "default", "flex", "priority", ...
	ServiceTier string
	// DropUnsupported drops parameters that the upstream does not take, and names them in
	// Header.DroppedParameters; otherwise they fail the call.
	DropUnsupported bool
	// Labels for accounting.
	Labels map[string]string
	// ExtraBody is a JSON object merged (RFC 7396) into the upstream's request last, for what is
	// not modelled here: JSON text as a string, []byte or json.RawMessage, or a value to marshal.
	ExtraBody any

	// CustomID names the request within a batch; nothing else looks at it.
	CustomID string

	// Proto is a request of the contract to begin with. It is copied, its messages come first,
	// and what else is set here replaces its fields.
	Proto *pb.ChatRequest
}

// Ptr returns a pointer to v, for the optional fields of a [Request].
func Ptr[T any](v T) *T { return &v }

// ToolChoice is whether the model may or must call tools.
type ToolChoice string

// Values of Request.ToolChoice; "" lets the upstream decide.
const (
	ToolChoiceAuto     ToolChoice = "auto"
	ToolChoiceNone     ToolChoice = "none"
	ToolChoiceRequired ToolChoice = "required"
)

var toolModes = map[ToolChoice]pb.ToolChoice_Mode{
	"":                 pb.ToolChoice_MODE_UNSPECIFIED,
	ToolChoiceAuto:     pb.ToolChoice_MODE_AUTO,
	ToolChoiceNone:     pb.ToolChoice_MODE_NONE,
	ToolChoiceRequired: pb.ToolChoice_MODE_REQUIRED,
}

// Tool is a function that the model may call, or, if Custom, a tool whose input is free text.
type Tool struct {
	Name        string
	Description string
	// Parameters is a JSON Schema: text as a string, []byte or json.RawMessage, which keeps the
	// order of keys, or a value to marshal. nil is a function without parameters.
	Parameters any
	// Strict asks the upstream to enforce the schema.
	Strict *bool
	// Custom makes this a free-form tool; InputFormat is its format, as Parameters are.
	Custom      bool
	InputFormat any
	// Raw is one element of the upstream's own list of tools, instead of all else.
	Raw json.RawMessage
}

// Format is the shape of an answer.
type Format struct {
	// Schema is a JSON Schema, as Tool.Parameters are; nil means any JSON object.
	Schema any
	// Name of the schema; "answer" when empty.
	Name        string
	Description string
	// Strict asks the upstream to enforce the schema.
	Strict *bool
	// Raw is the upstream's own constraint (a grammar, ...), instead of all else.
	Raw json.RawMessage
}

// JSONSchema wants an answer that matches a JSON Schema, for [Decode]: text as a string, []byte
// or json.RawMessage, or a value to marshal.
func JSONSchema(schema any) *Format { return &Format{Schema: schema} }

// JSONObject wants an answer that is any JSON object.
func JSONObject() *Format { return &Format{} }

// RoleTemplate says how one role is written for the upstream.
type RoleTemplate struct {
	Role         string // as the caller writes it
	APIRole      string // as it is sent; Role when empty
	Begin, End   string // put around the content
	FallbackRole string // use the template of this role instead
}

// ChatProto returns the request as the contract has it, or an [*Error] that says what makes no
// sense, and where.
func (r Request) ChatProto() (*pb.ChatRequest, error) {
	request, err := r.proto()
	if err != nil {
		return nil, err
	}
	return request, nil
}

func (r Request) proto() (*pb.ChatRequest, *Error) {
	request := &pb.ChatRequest{}
	if r.Proto != nil {
		request = proto.Clone(r.Proto).(*pb.ChatRequest)
	}
	messages := r.Messages
	if r.Prompt != "" {
		messages = append(messages[:len(messages):len(messages)], User(r.Prompt))
	}
	for _, message := range messages {
		if err := message.check(fmt.Sprintf("messages[%d]", len(request.Messages))); err != nil {
			return nil, err
		}
		request.Messages = append(request.Messages, message.Proto())
	}
	if len(request.Messages) == 0 {
		return nil, refused("messages", "expected Prompt or at least one message")
	}
	if request.Model = or(r.Model, request.Model); request.Model == "" {
		return nil, refused("model", `expected the name of a model, for example "gpt-4o-mini"`)
	}
	request.EndUserId = or(r.EndUserID, request.EndUserId)
	request.PromptCacheKey = or(r.PromptCacheKey, request.PromptCacheKey)
	request.ServiceTier = or(r.ServiceTier, request.ServiceTier)
	for _, field := range []struct{ name, text string }{
		{"model", request.Model}, {"end_user_id", request.EndUserId},
		{"prompt_cache_key", request.PromptCacheKey}, {"service_tier", request.ServiceTier},
		{"params.reasoning_effort", r.ReasoningEffort}, {"params.verbosity", r.Verbosity},
	} {
		if err := checkText(field.name, field.text); err != nil {
			return nil, err
		}
	}
	if r.DropUnsupported {
		request.UnsupportedParameterPolicy = pb.UnsupportedParameterPolicy_UNSUPPORTED_PARAMETER_POLICY_DROP
	}
	if r.Labels != nil {
		request.Labels = r.Labels
		for key, value := range r.Labels {
			if err := checkText("labels", key, value); err != nil {
				return nil, err
			}
		}
	}
	for _, set := range []func(*pb.ChatRequest) *Error{
		r.setParams, r.setTools, r.setFormat, r.setRoleTemplates, r.setExtraBody,
	} {
		if err := set(request); err != nil {
			return nil, err
		}
	}
	return request, nil
}

func (r Request) setParams(request *pb.ChatRequest) *Error {
	params := request.Params
	if params == nil {
		params = &pb.GenerationParams{}
	}
	params.Temperature = or(r.Temperature, params.Temperature)
	params.TopP = or(r.TopP, params.TopP)
	params.MinP = or(r.MinP, params.MinP)
	params.FrequencyPenalty = or(r.FrequencyPenalty, params.FrequencyPenalty)
	params.PresencePenalty = or(r.PresencePenalty, params.PresencePenalty)
	params.RepetitionPenalty = or(r.RepetitionPenalty, params.RepetitionPenalty)
	params.Seed = or(r.Seed, params.Seed)
	params.Logprobs = or(r.Logprobs, params.Logprobs)
	params.EnableThinking = or(r.EnableThinking, params.EnableThinking)
	params.ParallelToolCalls = or(r.ParallelToolCalls, params.ParallelToolCalls)
	params.ReasoningEffort = or(r.ReasoningEffort, params.ReasoningEffort)
	params.Verbosity = or(r.Verbosity, params.Verbosity)
	for _, field := range []struct {
		name  string
		value *int
		to    **int32
	}{
		{"top_k", r.TopK, &params.TopK},
		{"max_completion_tokens", r.MaxCompletionTokens, &params.MaxCompletionTokens},
		{"choice_count", r.ChoiceCount, &params.ChoiceCount},
		{"top_logprobs", r.TopLogprobs, &params.TopLogprobs},
	} {
		if field.value == nil {
			continue
		}
		value, err := int32Of("params."+field.name, *field.value)
		if err != nil {
			return err
		}
		*field.to = &value
	}
	if r.Stop != nil {
		params.Stop = r.Stop
		if err := checkText("params.stop", r.Stop...); err != nil {
			return err
		}
	}
	if r.LogitBias != nil {
		params.LogitBias = make(map[int32]float64, len(r.LogitBias))
		for token, bias := range r.LogitBias {
			id, err := int32Of("params.logit_bias", token)
			if err != nil {
				return err
			}
			params.LogitBias[id] = bias
		}
	}
	if request.Params != nil || proto.Size(params) > 0 {
		request.Params = params
	}
	return nil
}

func (r Request) setTools(request *pb.ChatRequest) *Error {
	if r.Tools != nil {
		request.Tools = nil
	}
	for i, tool := range r.Tools {
		one, err := tool.proto(fmt.Sprintf("tools[%d]", i))
		if err != nil {
			return err
		}
		request.Tools = append(request.Tools, one)
	}
	mode, known := toolModes[r.ToolChoice]
	if !known {
		return refused("tool_choice", `expected "auto", "none" or "required", got %q`, string(r.ToolChoice))
	}
	if r.ToolChoice != "" || r.ToolNames != nil {
		request.ToolChoice = &pb.ToolChoice{Mode: mode, ToolNames: r.ToolNames}
	}
	return checkText("tool_choice.tool_names", r.ToolNames...)
}

func (t Tool) proto(where string) (*pb.Tool, *Error) {
	if len(t.Raw) > 0 {
		if err := checkObject(where, t.Raw); err != nil {
			return nil, err
		}
		return &pb.Tool{Tool: &pb.Tool_RawJson{RawJson: string(t.Raw)}}, nil
	}
	if t.Name == "" {
		return nil, refused(where+".name", "missing")
	}
	if err := checkText(where, t.Name, t.Description); err != nil {
		return nil, err
	}
	if t.Custom {
		if t.Parameters != nil || t.Strict != nil {
			return nil, refused(where, "a custom tool has an InputFormat, and no Parameters")
		}
		format, err := object(where+".format_json", t.InputFormat)
		if err != nil {
			return nil, err
		}
		custom := &pb.CustomTool{Name: t.Name, Description: t.Description, FormatJson: format}
		return &pb.Tool{Tool: &pb.Tool_Custom{Custom: custom}}, nil
	}
	if t.InputFormat != nil {
		return nil, refused(where, "only a custom tool has an InputFormat")
	}
	schema, err := object(where+".parameters_schema_json", t.Parameters)
	if err != nil {
		return nil, err
	}
	function := &pb.FunctionTool{
		Name: t.Name, Description: t.Description, ParametersSchemaJson: schema, Strict: t.Strict,
	}
	return &pb.Tool{Tool: &pb.Tool_Function{Function: function}}, nil
}

func (r Request) setFormat(request *pb.ChatRequest) *Error {
	switch {
	case r.Format == nil:
		return nil
	case len(r.Format.Raw) > 0:
		if err := checkObject("response_format", r.Format.Raw); err != nil {
			return err
		}
		request.ResponseFormat = &pb.ResponseFormat{
			Format: &pb.ResponseFormat_RawJson{RawJson: string(r.Format.Raw)},
		}
	case r.Format.Schema == nil:
		request.ResponseFormat = &pb.ResponseFormat{
			Format: &pb.ResponseFormat_JsonObject{JsonObject: &pb.JsonObjectFormat{}},
		}
	default:
		schema, err := object("response_format.json_schema.schema_json", r.Format.Schema)
		if err != nil {
			return err
		}
		if schema == "" {
			return refused("response_format.json_schema.schema_json", "missing")
		}
		if err := checkText("response_format.json_schema", r.Format.Name, r.Format.Description); err != nil {
			return err
		}
		request.ResponseFormat = &pb.ResponseFormat{
			Format: &pb.ResponseFormat_JsonSchema{JsonSchema: &pb.JsonSchemaFormat{
				// Upstreams want a name, and few people have one at hand.
				Name:        or(r.Format.Name, "answer"),
				SchemaJson:  schema,
				Description: r.Format.Description,
				Strict:      r.Format.Strict,
			}},
		}
	}
	return nil
}

func (r Request) setRoleTemplates(request *pb.ChatRequest) *Error {
	if r.RoleTemplates != nil {
		request.RoleTemplates = nil
	}
	for i, t := range r.RoleTemplates {
		where := fmt.Sprintf("role_templates[%d]", i)
		if t.Role == "" {
			return refused(where+".role", "missing")
		}
		if err := checkText(where, t.Role, t.APIRole, t.Begin, t.End, t.FallbackRole); err != nil {
			return err
		}
		request.RoleTemplates = append(request.RoleTemplates, &pb.RoleTemplate{
			Role: t.Role, ApiRole: t.APIRole, Begin: t.Begin, End: t.End, FallbackRole: t.FallbackRole,
		})
	}
	return nil
}

func (r Request) setExtraBody(request *pb.ChatRequest) *Error {
	if r.ExtraBody == nil {
		return nil
	}
	text, err := object("extra_body_json", r.ExtraBody)
	request.ExtraBodyJson = text
	return err
}

// or returns the first value unless it is zero: a pointer or a text that is set replaces.
func or[T comparable](value, otherwise T) T {
	var zero T
	if value != zero {
		return value
	}
	return otherwise
}

func int32Of(where string, value int) (int32, *Error) {
	if value < math.MinInt32 || value > math.MaxInt32 {
		return 0, refused(where, "%d does not fit", value)
	}
	return int32(value), nil
}
