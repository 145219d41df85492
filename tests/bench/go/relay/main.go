// Relay is the plain way to relay chat in Go, a yardstick for the gateway: the same contract in front
// of the same upstream, one message for each chunk, and nothing else. No keys, no callers, no limits,
// no retries, no log, no metrics, and few of the contract's fields.
//
//	relay 127.0.0.1:50051 http://127.0.0.1:9000/v1 sk-key
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	contract "github.com/tokenwire/tokenwire/clients/go/tokenwire/v1"
)

func main() {
	if len(os.Args) != 4 {
		log.Fatal("usage: relay HOST:PORT UPSTREAM KEY")
	}
	listener, err := net.Listen("tcp", os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(listener.Addr()) // whoever started it waits for this line
	server := grpc.NewServer(grpc.MaxRecvMsgSize(32<<20), grpc.MaxSendMsgSize(32<<20))
	contract.RegisterChatServiceServer(server, newRelay(os.Args[2], os.Args[3]))
	log.Fatal(server.Serve(listener))
}

type relay struct {
	contract.UnimplementedChatServiceServer
	url, authorization string
	client             *http.Client
}

func newRelay(upstream, key string) *relay {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.Proxy = nil
	transport.MaxIdleConnsPerHost = 100_000 // idle ones are to be kept, however many
	transport.MaxIdleConns = 0
	transport.DisableCompression = true
	return &relay{url: upstream + "/chat/completions", authorization: "Bearer " + key,
		client: &http.Client{Transport: transport}}
}

type message struct {
	Role      string     `json:"role,omitempty"`
	Content   *string    `json:"content"`
	ToolCalls []toolCall `json:"tool_calls,omitempty"`
}

type toolCall struct {
	Index    int32  `json:"index"`
	ID       string `json:"id,omitempty"`
	Function struct {
		Name      string `json:"name,omitempty"`
		Arguments string `json:"arguments"`
	} `json:"function"`
}

type usage struct {
	Prompt     int32 `json:"prompt_tokens"`
	Completion int32 `json:"completion_tokens"`
	Total      int32 `json:"total_tokens"`
}

type completion struct {
	ID      string `json:"id"`
	Model   string `json:"model"`
	Choices []struct {
		Message      message `json:"message"`
		Delta        message `json:"delta"`
		FinishReason string  `json:"finish_reason"`
	} `json:"choices"`
	Usage *usage `json:"usage"`
}

// Chat relays a whole answer.
func (r *relay) Chat(ctx context.Context, asked *contract.ChatRequest) (*contract.ChatResponse, error) {
	body, err := r.post(ctx, asked, false)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	var got completion
	if err := json.NewDecoder(body).Decode(&got); err != nil {
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	io.Copy(io.Discard, body) // to its end, so that the connection can be used again
	if len(got.Choices) == 0 {
		return nil, status.Error(codes.Unavailable, "an answer without choices")
	}
	said := got.Choices[0].Message
	answer := &contract.ChatMessage{Role: said.Role, Content: said.Content}
	for _, call := range said.ToolCalls {
		answer.ToolCalls = append(answer.ToolCalls, &contract.ToolCall{Id: call.ID, Call: &contract.ToolCall_Function{
			Function: &contract.FunctionCall{Name: call.Function.Name, ArgumentsJson: call.Function.Arguments}}})
	}
	return &contract.ChatResponse{
		Header: &contract.ResponseHeader{Id: got.ID, Model: got.Model},
		Choices: []*contract.Choice{{Message: answer, FinishReason: contract.FinishReason_FINISH_REASON_STOP,
			FinishReasonRaw: got.Choices[0].FinishReason}},
		Usage: counted(got.Usage),
	}, nil
}

// StreamChat relays an answer as it grows.
func (r *relay) StreamChat(asked *contract.StreamChatRequest, out grpc.ServerStreamingServer[contract.StreamChatResponse]) error {
	body, err := r.post(out.Context(), asked.Chat, true)
	if err != nil {
		return err
	}
	defer body.Close()
	lines := bufio.NewScanner(body)
	lines.Buffer(nil, 1<<20)
	var header bool
	var last *usage
	for lines.Scan() {
		data, isData := bytes.CutPrefix(lines.Bytes(), []byte("data: "))
		if !isData {
			continue
		}
		if string(data) == "[DONE]" {
			io.Copy(io.Discard, body)
			return out.Send(&contract.StreamChatResponse{Event: &contract.StreamChatResponse_Trailer{
				Trailer: &contract.StreamTrailer{Usage: counted(last)}}})
		}
		var got completion
		if err := json.Unmarshal(data, &got); err != nil {
			return status.Error(codes.Unavailable, err.Error())
		}
		if !header {
			header = true
			if err := out.Send(&contract.StreamChatResponse{Event: &contract.StreamChatResponse_Header{
				Header: &contract.ResponseHeader{Id: got.ID, Model: got.Model}}}); err != nil {
				return err
			}
		}
		if got.Usage != nil {
			last = got.Usage
		}
		if len(got.Choices) == 0 {
			continue
		}
		if err := send(out, got.Choices[0].Delta, got.Choices[0].FinishReason); err != nil {
			return err
		}
	}
	return status.Error(codes.Unavailable, "the stream ended before its end")
}

func send(out grpc.ServerStreamingServer[contract.StreamChatResponse], said message, finish string) error {
	delta := &contract.Delta{}
	if said.Content != nil {
		delta.Content = *said.Content
	}
	for _, call := range said.ToolCalls {
		delta.ToolCalls = append(delta.ToolCalls, &contract.ToolCallDelta{Index: call.Index, Id: call.ID,
			Name: call.Function.Name, Arguments: call.Function.Arguments})
	}
	if delta.Content != "" || delta.ToolCalls != nil {
		if err := out.Send(&contract.StreamChatResponse{Event: &contract.StreamChatResponse_Delta{Delta: delta}}); err != nil {
			return err
		}
	}
	if finish == "" {
		return nil
	}
	return out.Send(&contract.StreamChatResponse{Event: &contract.StreamChatResponse_Finish{
		Finish: &contract.Finish{FinishReason: contract.FinishReason_FINISH_REASON_STOP, FinishReasonRaw: finish}}})
}

// post asks the upstream. Its error is a gRPC status.
func (r *relay) post(ctx context.Context, asked *contract.ChatRequest, stream bool) (io.ReadCloser, error) {
	type options struct {
		IncludeUsage bool `json:"include_usage"`
	}
	body := struct {
		Model         string    `json:"model"`
		Messages      []message `json:"messages"`
		Tools         []any     `json:"tools,omitempty"`
		Stream        bool      `json:"stream,omitempty"`
		StreamOptions *options  `json:"stream_options,omitempty"`
	}{Model: asked.GetModel(), Stream: stream}
	for _, m := range asked.GetMessages() {
		body.Messages = append(body.Messages, message{Role: m.Role, Content: m.Content})
	}
	for _, tool := range asked.GetTools() {
		body.Tools = append(body.Tools, map[string]any{"type": "function", "function": map[string]any{
			"name": tool.GetFunction().GetName(), "parameters": json.RawMessage(tool.GetFunction().GetParametersSchemaJson())}})
	}
	if stream {
		body.StreamOptions = &options{IncludeUsage: true}
	}
	encoded, err := json.Marshal(body)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, r.url, bytes.NewReader(encoded))
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	request.Header.Set("Content-Type", "application/json")
	request.Header.Set("Authorization", r.authorization)
	reply, err := r.client.Do(request)
	if err != nil {
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	if reply.StatusCode != http.StatusOK {
		reply.Body.Close()
		return nil, status.Error(codes.Unavailable, reply.Status)
	}
	return reply.Body, nil
}

func counted(u *usage) *contract.Usage {
	if u == nil {
		return nil
	}
	return &contract.Usage{PromptTokens: u.Prompt, CompletionTokens: u.Completion, TotalTokens: u.Total}
}
