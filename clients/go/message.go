package tokenwire

import (
	"bytes"
	"encoding/json"
	"fmt"
	"unicode/utf8"

	pb "github.com/tokenwire/tokenwire/clients/go/tokenwire/v1"
)

// Message is one turn of a conversation. [System], [User] and [Assistant] make the common ones,
// [Reply.Message] hands back an answer, [ToolCall.Answer] the result of a call.
type Message struct {
	// Role is "system", "developer", "user", "assistant", "tool", or one that a role template
	// names.
	Role string
	// Content is the text. An assistant's empty Content is sent as JSON null if it called tools
	// or refused.
	Content string
	// Parts are content of more kinds than text, in order; instead of Content.
	Parts []Part
	// Name of the participant, where the upstream takes one.
	Name string
	// ToolCalls are what the assistant wants called in this turn.
	ToolCalls []ToolCall
	// ToolCallID is the call that a message of role "tool" answers.
	ToolCallID string
	// Reasoning is what the model showed before it answered.
	Reasoning string
	// Refusal is why the model declined.
	Refusal string
	// Annotations cite sources of Content.
	Annotations []Annotation
	// Extra is a JSON object with fields that this version does not model; sent back unchanged.
	Extra json.RawMessage
}

// System is a message that instructs the model.
func System(text string) Message { return Message{Role: "system", Content: text} }

// User is a message of the user.
func User(text string) Message { return Message{Role: "user", Content: text} }

// UserParts is a message of the user with content of several kinds.
func UserParts(parts ...Part) Message { return Message{Role: "user", Parts: parts} }

// Assistant is an earlier answer, known only by its text.
func Assistant(text string) Message { return Message{Role: "assistant", Content: text} }

// Part is one piece of a message's content: exactly one of the fields but Extra is set.
type Part struct {
	Text  string
	Image *Media
	Audio *Media
	Video *Media
	File  *Media
	// Raw is the JSON object of a kind that this version does not model, sent as it is.
	Raw json.RawMessage
	// Extra is a JSON object merged into the part, such as cache breakpoints.
	Extra json.RawMessage
}

// Text is a part that is text.
func Text(text string) Part { return Part{Text: text} }

// ImageURL is a part that is an image, by an https: or data: URL.
func ImageURL(url string) Part { return Part{Image: &Media{URL: url}} }

// ImageData is a part that is an image, by its bytes; mediaType such as "image/png".
func ImageData(mediaType string, data []byte) Part {
	return Part{Image: &Media{MediaType: mediaType, Data: data}}
}

// Media is bytes or where they are: exactly one of Data, URL and FileID is set.
type Media struct {
	Data      []byte
	URL       string
	FileID    string // as the upstream knows it
	MediaType string // IANA, such as "image/png"; required with Data
	Filename  string
	Detail    string // hint such as "low", "high", "auto"
}

// Annotation cites a source. Offsets count Unicode code points of the whole content.
type Annotation struct {
	Start, End int // End is exclusive
	URL        string
	Title      string
}

// Proto returns the message of the contract. It shares the memory of Parts' bytes.
func (m Message) Proto() *pb.ChatMessage {
	message := &pb.ChatMessage{
		Role: m.Role, Name: m.Name, ToolCallId: m.ToolCallID, ExtraJson: string(m.Extra),
	}
	// A turn that only calls tools or refuses has null content, not an empty one.
	if m.Content != "" || len(m.Parts) == 0 && len(m.ToolCalls) == 0 && m.Refusal == "" {
		message.Content = &m.Content
	}
	for _, part := range m.Parts {
		message.Parts = append(message.Parts, part.proto())
	}
	for _, call := range m.ToolCalls {
		message.ToolCalls = append(message.ToolCalls, call.Proto())
	}
	if m.Reasoning != "" {
		message.Reasoning = &m.Reasoning
	}
	if m.Refusal != "" {
		message.Refusal = &m.Refusal
	}
	for _, a := range m.Annotations {
		message.Annotations = append(message.Annotations, &pb.Annotation{
			StartOffset: int32(a.Start), EndOffset: int32(a.End), Url: a.URL, Title: a.Title,
		})
	}
	return message
}

// MessageFromProto returns the message that one of the contract stands for.
func MessageFromProto(p *pb.ChatMessage) Message {
	m := Message{
		Role: p.GetRole(), Content: p.GetContent(), Name: p.GetName(), ToolCallID: p.GetToolCallId(),
		Reasoning: p.GetReasoning(), Refusal: p.GetRefusal(), Extra: raw(p.GetExtraJson()),
	}
	for _, part := range p.GetParts() {
		m.Parts = append(m.Parts, partFromProto(part))
	}
	for _, call := range p.GetToolCalls() {
		m.ToolCalls = append(m.ToolCalls, ToolCallFromProto(call))
	}
	for _, a := range p.GetAnnotations() {
		m.Annotations = append(m.Annotations, Annotation{
			int(a.GetStartOffset()), int(a.GetEndOffset()), a.GetUrl(), a.GetTitle(),
		})
	}
	return m
}

func (m Message) check(where string) *Error {
	switch {
	case m.Role == "":
		return refused(where+".role", `expected a role such as "user"`)
	case m.Content != "" && len(m.Parts) > 0:
		return refused(where+".content", "expected only one of Content and Parts")
	}
	for _, field := range []struct{ name, text string }{
		{"role", m.Role}, {"content", m.Content}, {"name", m.Name}, {"tool_call_id", m.ToolCallID},
		{"reasoning", m.Reasoning}, {"refusal", m.Refusal},
	} {
		if err := checkText(where+"."+field.name, field.text); err != nil {
			return err
		}
	}
	for i, part := range m.Parts {
		if err := part.check(fmt.Sprintf("%s.parts[%d]", where, i)); err != nil {
			return err
		}
	}
	for i, call := range m.ToolCalls {
		at := fmt.Sprintf("%s.tool_calls[%d]", where, i)
		if err := checkText(at, call.ID, call.Name, call.RawArguments); err != nil {
			return err
		}
	}
	for i, a := range m.Annotations {
		at := fmt.Sprintf("%s.annotations[%d]", where, i)
		if err := checkText(at, a.URL, a.Title); err != nil {
			return err
		}
		for _, offset := range []int{a.Start, a.End} {
			if _, err := int32Of(at, offset); err != nil {
				return err
			}
		}
	}
	return checkObject(where+".extra_json", m.Extra)
}

func (p Part) check(where string) *Error {
	set := 0
	for _, is := range []bool{
		p.Text != "", p.Image != nil, p.Audio != nil, p.Video != nil, p.File != nil, len(p.Raw) > 0,
	} {
		if is {
			set++
		}
	}
	if set > 1 {
		return refused(where, "expected only one of Text, Image, Audio, Video, File and Raw")
	}
	for _, m := range []*Media{p.Image, p.Audio, p.Video, p.File} {
		if m == nil {
			continue
		}
		sources := 0
		for _, is := range []bool{m.Data != nil, m.URL != "", m.FileID != ""} {
			if is {
				sources++
			}
		}
		switch {
		case sources != 1:
			return refused(where, "expected one of Data, URL and FileID")
		case m.Data != nil && m.MediaType == "":
			return refused(where+".media_type", `missing, expected for example "image/png"`)
		}
		if err := checkText(where, m.URL, m.FileID, m.MediaType, m.Filename, m.Detail); err != nil {
			return err
		}
	}
	if err := checkText(where+".text", p.Text); err != nil {
		return err
	}
	if err := checkObject(where+".raw_json", p.Raw); err != nil {
		return err
	}
	return checkObject(where+".extra_json", p.Extra)
}

func (p Part) proto() *pb.ContentPart {
	part := &pb.ContentPart{ExtraJson: string(p.Extra)}
	switch {
	case p.Image != nil:
		part.Part = &pb.ContentPart_Image{Image: p.Image.proto()}
	case p.Audio != nil:
		part.Part = &pb.ContentPart_Audio{Audio: p.Audio.proto()}
	case p.Video != nil:
		part.Part = &pb.ContentPart_Video{Video: p.Video.proto()}
	case p.File != nil:
		part.Part = &pb.ContentPart_File{File: p.File.proto()}
	case len(p.Raw) > 0:
		part.Part = &pb.ContentPart_RawJson{RawJson: string(p.Raw)}
	default:
		part.Part = &pb.ContentPart_Text{Text: p.Text}
	}
	return part
}

func partFromProto(p *pb.ContentPart) Part {
	return Part{
		Text:  p.GetText(),
		Image: mediaFromProto(p.GetImage()),
		Audio: mediaFromProto(p.GetAudio()),
		Video: mediaFromProto(p.GetVideo()),
		File:  mediaFromProto(p.GetFile()),
		Raw:   raw(p.GetRawJson()),
		Extra: raw(p.GetExtraJson()),
	}
}

func (m *Media) proto() *pb.Media {
	media := &pb.Media{MediaType: m.MediaType, Filename: m.Filename, Detail: m.Detail}
	switch {
	case m.URL != "":
		media.Source = &pb.Media_Url{Url: m.URL}
	case m.FileID != "":
		media.Source = &pb.Media_FileId{FileId: m.FileID}
	case m.Data != nil:
		media.Source = &pb.Media_Data{Data: m.Data}
	}
	return media
}

func mediaFromProto(p *pb.Media) *Media {
	if p == nil {
		return nil
	}
	return &Media{
		Data: p.GetData(), URL: p.GetUrl(), FileID: p.GetFileId(),
		MediaType: p.GetMediaType(), Filename: p.GetFilename(), Detail: p.GetDetail(),
	}
}

// ToolCall is a call that the model wants made.
type ToolCall struct {
	// ID is repeated by the message that answers; Answer and AnswerJSON do that.
	ID string
	// Name of the tool.
	Name string
	// RawArguments is exactly what the model wrote: usually a JSON object, but it may be cut off
	// or no JSON at all; the input of a custom tool.
	RawArguments string
	// Custom tells that this calls a free-form tool, whose input is text and not JSON.
	Custom bool
}

// Decode parses the arguments into v as [json.Unmarshal] does; no text counts as no arguments.
// It fails when the model wrote anything but a JSON object. Whole numbers beyond 2^53 are exact
// in fields of integer types, and not in an any.
func (c ToolCall) Decode(v any) error {
	text := bytes.TrimSpace([]byte(c.RawArguments))
	if len(text) == 0 && !c.Custom {
		text = []byte("{}")
	}
	what := fmt.Sprintf("arguments of the call of %q (%s)", c.Name, c.ID)
	if json.Valid(text) && text[0] != '{' {
		return fmt.Errorf("tokenwire: the %s are no JSON object: %s", what, start(text))
	}
	if err := json.Unmarshal(text, v); err != nil {
		return fmt.Errorf("tokenwire: the %s: %w: %s", what, err, start(text))
	}
	return nil
}

// Answer is the message that gives the model the result of the call.
func (c ToolCall) Answer(text string) Message {
	return Message{Role: "tool", ToolCallID: c.ID, Content: text}
}

// AnswerJSON is the message that gives the model the result of the call, as JSON.
func (c ToolCall) AnswerJSON(result any) (Message, error) {
	text, err := marshal(result)
	if err != nil {
		return Message{}, fmt.Errorf("tokenwire: the answer to %q: %w", c.Name, err)
	}
	return c.Answer(string(text)), nil
}

// Proto returns the call as the contract has it.
func (c ToolCall) Proto() *pb.ToolCall {
	call := &pb.ToolCall{Id: c.ID}
	if c.Custom {
		call.Call = &pb.ToolCall_Custom{Custom: &pb.CustomCall{Name: c.Name, Input: c.RawArguments}}
	} else {
		call.Call = &pb.ToolCall_Function{
			Function: &pb.FunctionCall{Name: c.Name, ArgumentsJson: c.RawArguments},
		}
	}
	return call
}

// ToolCallFromProto returns the call that one of the contract stands for.
func ToolCallFromProto(p *pb.ToolCall) ToolCall {
	if custom := p.GetCustom(); custom != nil {
		return ToolCall{p.GetId(), custom.GetName(), custom.GetInput(), true}
	}
	return ToolCall{p.GetId(), p.GetFunction().GetName(), p.GetFunction().GetArgumentsJson(), false}
}

// DecodeArguments returns the arguments of a call as a T; see [ToolCall.Decode].
func DecodeArguments[T any](call ToolCall) (T, error) {
	var arguments T
	err := call.Decode(&arguments)
	return arguments, err
}

// --- values -------------------------------------------------------------------------

func raw(text string) json.RawMessage {
	if text == "" {
		return nil
	}
	return json.RawMessage(text)
}

// marshal is json.Marshal without HTML escapes: models read the text, browsers do not.
func marshal(v any) ([]byte, error) {
	var text bytes.Buffer
	encoder := json.NewEncoder(&text)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(v); err != nil {
		return nil, err
	}
	return bytes.TrimRight(text.Bytes(), "\n"), nil
}

// object returns JSON text of v: of text itself unchanged, keys in their order.
func object(where string, v any) (string, *Error) {
	var text []byte
	switch v := v.(type) {
	case nil:
		return "", nil
	case string:
		text = []byte(v)
	case []byte:
		text = v
	case json.RawMessage:
		text = v
	default:
		var err error
		if text, err = marshal(v); err != nil {
			return "", refused(where, "no JSON: %v", err)
		}
	}
	if err := checkObject(where, text); err != nil {
		return "", err
	}
	return string(text), nil
}

func checkObject(where string, text []byte) *Error {
	if len(text) == 0 {
		return nil
	}
	trimmed := bytes.TrimSpace(text)
	if len(trimmed) == 0 || trimmed[0] != '{' || !json.Valid(trimmed) {
		return refused(where, "expected a JSON object, got %s", start(text))
	}
	return checkText(where, string(text))
}

func checkText(where string, texts ...string) *Error {
	for _, text := range texts {
		if !utf8.ValidString(text) {
			return refused(where, "expected UTF-8")
		}
	}
	return nil
}

func start(text []byte) string {
	const most = 80
	if runes := []rune(string(text[:min(len(text), 4*most)])); len(runes) > most {
		return fmt.Sprintf("%q...", string(runes[:most]))
	}
	return fmt.Sprintf("%q", text)
}
