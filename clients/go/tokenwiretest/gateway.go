// Package tokenwiretest has a gateway inside your test process: real gRPC on a loopback port,
// answers from a script.
//
//	gateway := tokenwiretest.NewGateway(t)
//	gateway.Reply(tokenwiretest.Text("Hello", " world"))
//	reply, err := gateway.Client(t).Chat(ctx, tokenwire.Request{Model: "any", Prompt: "Hi"})
//
// It speaks the contract as the gateway does (order of events, error details, trailers), except
// where a test asks it not to ([Gateway.Cut]). It calls no model and counts words as tokens.
package tokenwiretest

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	tokenwire "github.com/tokenwire/tokenwire/clients/go"
	pb "github.com/tokenwire/tokenwire/clients/go/tokenwire/v1"
)

// Gateway answers each call with the next of what was scripted, in the order of the calls; a batch
// takes one answer for each of its requests. A call that finds none fails with INTERNAL. It is
// safe for use by several goroutines.
type Gateway struct {
	// Target is the HOST:PORT to connect to.
	Target string

	server  *grpc.Server
	serving []grpc.ServerOption
	served  chan struct{}
	token   string
	models  []string

	mu      sync.Mutex
	scripts []script
	calls   []*ReceivedCall
}

// An Option changes a Gateway.
type Option func(*Gateway)

// WithToken makes callers present a token; without it there is no check.
func WithToken(token string) Option { return func(g *Gateway) { g.token = token } }

// WithModels replaces the models that are listed, which are "gpt-4o-mini" alone.
func WithModels(names ...string) Option { return func(g *Gateway) { g.models = names } }

// WithServerOptions passes options on to gRPC, such as credentials for TLS. They come after the
// gateway's own and so replace them.
func WithServerOptions(options ...grpc.ServerOption) Option {
	return func(g *Gateway) { g.serving = append(g.serving, options...) }
}

// NewGateway starts a gateway that ends with the test.
func NewGateway(t testing.TB, options ...Option) *Gateway {
	t.Helper()
	g, err := Start(options...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(g.Close)
	return g
}

// Start starts a gateway; Close ends it.
func Start(options ...Option) (*Gateway, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("tokenwiretest: %w", err)
	}
	g := &Gateway{
		Target: listener.Addr().String(),
		models: []string{"gpt-4o-mini"},
		served: make(chan struct{}),
		serving: []grpc.ServerOption{
			grpc.MaxRecvMsgSize(tokenwire.MaxMessageBytes),
			grpc.MaxSendMsgSize(tokenwire.MaxMessageBytes),
			grpc.WaitForHandlers(true), // after Close no goroutine is left
			// As the gateway: a client may ping each 10 s, also while nothing runs.
			grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{
				MinTime: 10 * time.Second, PermitWithoutStream: true,
			}),
		},
	}
	for _, option := range options {
		option(g)
	}
	g.server = grpc.NewServer(g.serving...)
	pb.RegisterChatServiceServer(g.server, &chat{gateway: g})
	pb.RegisterTokenizerServiceServer(g.server, &tokenizer{gateway: g})
	pb.RegisterModelServiceServer(g.server, &lister{gateway: g})
	go func() {
		defer close(g.served)
		_ = g.server.Serve(listener) // ends by Close
	}()
	return g, nil
}

// Close cancels what runs and frees the port.
func (g *Gateway) Close() {
	g.server.Stop()
	<-g.served
}

// Client returns a client of this gateway that is closed with the test. It presents the token that
// the gateway wants, unless options say otherwise.
func (g *Gateway) Client(t testing.TB, options ...tokenwire.Option) *tokenwire.Client {
	t.Helper()
	options = append([]tokenwire.Option{tokenwire.WithToken(g.token)}, options...)
	client, err := tokenwire.New(g.Target, options...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	return client
}

// --- the script ---------------------------------------------------------------------

// Reply answers the next call with these parts, and all that belongs to a whole answer.
func (g *Gateway) Reply(parts ...Part) *Gateway {
	return g.add(script{events: flat(parts)})
}

// Answer is a whole answer with what Reply makes up.
type Answer struct {
	Parts []Part
	// FinishReason of each choice that begins; FinishStop, or FinishToolCalls after tool calls,
	// unless given.
	FinishReason tokenwire.FinishReason
	// Usage; words are counted unless given.
	Usage *tokenwire.Usage
}

// ReplyWith answers the next call with an answer.
func (g *Gateway) ReplyWith(answer Answer) *Gateway {
	why := answer.FinishReason
	if _, known := pb.FinishReason_value["FINISH_REASON_"+strings.ToUpper(string(why))]; why != "" && !known {
		panic(fmt.Sprintf("tokenwiretest: no such finish reason: %q", string(why)))
	}
	return g.add(script{events: flat(answer.Parts), finishReason: why, usage: answer.Usage})
}

// Fail fails the next call as the gateway does.
func (g *Gateway) Fail(failure Failure) *Gateway {
	failure.status() // a mistake in the script panics where it is made
	return g.add(script{events: flat(failure.After), kind: failing, failure: failure})
}

// Cut answers with these parts, then ends with OK although the answer is not whole. The gateway
// never does this; a broken proxy might. Streams only: any other call fails with
// UPSTREAM_STREAM_INTERRUPTED.
func (g *Gateway) Cut(parts ...Part) *Gateway {
	return g.add(script{
		events: flat(parts), kind: cut,
		failure: Failure{Reason: tokenwire.ReasonUpstreamStreamInterrupted, Message: "cut by the test"},
	})
}

// Hang answers with these parts, then stays silent until the caller leaves.
func (g *Gateway) Hang(parts ...Part) *Gateway {
	return g.add(script{events: flat(parts), kind: hanging})
}

func (g *Gateway) add(s script) *Gateway {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.scripts = append(g.scripts, s)
	return g
}

func (g *Gateway) next() script {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.scripts) == 0 {
		return script{kind: failing, failure: Failure{
			Reason:  tokenwire.ReasonInternal,
			Message: "tokenwiretest has no answer left: script one with Reply, Fail, Cut or Hang",
		}}
	}
	s := g.scripts[0]
	g.scripts = g.scripts[1:]
	return s
}

// --- what arrived -------------------------------------------------------------------

// ReceivedCall is one RPC as it arrived; each of gRPC's own retries is one of its own.
type ReceivedCall struct {
	// Method, for example "StreamChat".
	Method string
	// Request is the message of the contract.
	Request proto.Message
	// Metadata that came with it.
	Metadata metadata.MD

	mu       sync.Mutex
	answered bool
	over     chan struct{}
}

// Chat returns the chat that a Chat, a StreamChat or a CountTokens asks for; nil for other methods.
func (c *ReceivedCall) Chat() *pb.ChatRequest {
	switch request := c.Request.(type) {
	case *pb.ChatRequest:
		return request
	case *pb.StreamChatRequest:
		return request.GetChat()
	case *pb.CountTokensRequest:
		return request.GetChat()
	}
	return nil
}

// WaitCancelled waits for the call to be over and tells whether the caller left before its end;
// false after the timeout.
func (c *ReceivedCall) WaitCancelled(timeout time.Duration) bool {
	select {
	case <-c.over:
	case <-time.After(timeout):
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return !c.answered
}

// Calls returns every RPC that has arrived, oldest first.
func (g *Gateway) Calls() []*ReceivedCall {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.calls)
}

// accept notes a call; its end must be told by the function that comes back.
func (g *Gateway) accept(ctx context.Context, method string, request proto.Message) (*ReceivedCall, func(*error)) {
	md, _ := metadata.FromIncomingContext(ctx)
	call := &ReceivedCall{Method: method, Request: request, Metadata: md, over: make(chan struct{})}
	g.mu.Lock()
	g.calls = append(g.calls, call)
	g.mu.Unlock()
	trailer := metadata.MD{}
	if ids := md.Get("x-request-id"); len(ids) > 0 {
		trailer.Set("x-request-id", ids[0])
	}
	return call, func(err *error) {
		if failed, ok := (*err).(*failedError); ok {
			if pushback := failed.pushback(); pushback != "" {
				trailer.Set("grpc-retry-pushback-ms", pushback)
			}
			*err = status.FromProto(failed.status()).Err()
		}
		_ = grpc.SetTrailer(ctx, trailer) // fails only where nobody listens any more
		call.mu.Lock()
		call.answered = ctx.Err() == nil
		call.mu.Unlock()
		close(call.over)
	}
}

func (g *Gateway) authorized(call *ReceivedCall) error {
	if got := call.Metadata.Get("authorization"); g.token != "" && (len(got) != 1 || got[0] != "Bearer "+g.token) {
		return refused(tokenwire.ReasonCallerUnauthenticated, "missing or wrong token")
	}
	return nil
}

// failedError carries a failure to the end of its call, which makes status and trailers of it.
type failedError struct{ Failure }

func (f *failedError) Error() string { return f.Message }

func refused(reason tokenwire.Reason, message string) error {
	return &failedError{Failure{Reason: reason, Message: message}}
}

// --- the services -------------------------------------------------------------------

type chat struct {
	pb.UnimplementedChatServiceServer
	gateway *Gateway
}

func (s *chat) Chat(ctx context.Context, request *pb.ChatRequest) (_ *pb.ChatResponse, err error) {
	call, end := s.gateway.accept(ctx, "Chat", request)
	defer end(&err)
	if err := s.gateway.authorized(call); err != nil {
		return nil, err
	}
	return s.gateway.next().folded(ctx, request)
}

func (s *chat) StreamChat(request *pb.StreamChatRequest, stream grpc.ServerStreamingServer[pb.StreamChatResponse]) (err error) {
	ctx := stream.Context()
	call, end := s.gateway.accept(ctx, "StreamChat", request)
	defer end(&err)
	if err := s.gateway.authorized(call); err != nil {
		return err
	}
	script := s.gateway.next()
	if script.kind == failing && len(script.events) == 0 {
		return &failedError{script.failure}
	}
	var answer tokenwire.Accumulator
	for _, event := range script.all("fake", request.GetChat()) {
		answer.Add(event)
		if delta := event.GetDelta(); delta != nil && request.GetMode() == pb.StreamMode_STREAM_MODE_CUMULATIVE {
			event = snapshot(&answer, delta.GetChoiceIndex())
		}
		if err := stream.Send(event); err != nil {
			return err
		}
	}
	switch script.kind {
	case failing:
		return &failedError{script.failure}
	case hanging:
		<-ctx.Done()
		return ctx.Err()
	}
	return nil
}

func (s *chat) BatchChat(request *pb.BatchChatRequest, stream grpc.ServerStreamingServer[pb.BatchChatResponse]) (err error) {
	ctx := stream.Context()
	call, end := s.gateway.accept(ctx, "BatchChat", request)
	defer end(&err)
	if err := s.gateway.authorized(call); err != nil {
		return err
	}
	scripts := make([]script, len(request.GetItems()))
	for i := range scripts {
		scripts[i] = s.gateway.next()
	}
	// Last item first: results come in order of completion, and code that takes it for the order
	// of the requests should notice in a test.
	for i := len(scripts) - 1; i >= 0; i-- {
		item := request.GetItems()[i]
		result := &pb.BatchChatResponse{Index: int32(i), CustomId: item.GetCustomId()}
		answer, err := scripts[i].folded(ctx, item.GetChat())
		if failed, ok := err.(*failedError); ok {
			result.Result = &pb.BatchChatResponse_Error{Error: failed.status()}
		} else if err != nil {
			return err
		} else {
			result.Result = &pb.BatchChatResponse_Response{Response: answer}
		}
		if err := stream.Send(result); err != nil {
			return err
		}
	}
	return nil
}

// folded returns the answer as a whole.
func (s script) folded(ctx context.Context, request *pb.ChatRequest) (*pb.ChatResponse, error) {
	switch s.kind {
	case hanging:
		<-ctx.Done()
		return nil, ctx.Err()
	case failing, cut:
		return nil, &failedError{s.failure}
	}
	var answer tokenwire.Accumulator
	for _, event := range s.all("fake", request) {
		answer.Add(event)
	}
	return answer.SoFar().Proto(), nil
}

func snapshot(answer *tokenwire.Accumulator, index int32) *pb.StreamChatResponse {
	s := &pb.Snapshot{State: pb.Snapshot_STATE_STREAMING, ChoiceIndex: index}
	for _, choice := range answer.SoFar().Choices {
		if choice.Index == int(index) {
			s.Message = choice.Proto().GetMessage()
		}
	}
	return &pb.StreamChatResponse{Event: &pb.StreamChatResponse_Snapshot{Snapshot: s}}
}

type tokenizer struct {
	pb.UnimplementedTokenizerServiceServer
	gateway *Gateway
}

func (s *tokenizer) CountTokens(ctx context.Context, request *pb.CountTokensRequest) (_ *pb.CountTokensResponse, err error) {
	call, end := s.gateway.accept(ctx, "CountTokens", request)
	defer end(&err)
	if err := s.gateway.authorized(call); err != nil {
		return nil, err
	}
	total := len(strings.Fields(request.GetText()))
	for _, message := range request.GetChat().GetMessages() {
		total += len(strings.Fields(message.GetContent()))
	}
	return &pb.CountTokensResponse{TotalTokens: int32(total), Tokenizer: "words"}, nil
}

func (s *tokenizer) Tokenize(ctx context.Context, request *pb.TokenizeRequest) (_ *pb.TokenizeResponse, err error) {
	call, end := s.gateway.accept(ctx, "Tokenize", request)
	defer end(&err)
	if err := s.gateway.authorized(call); err != nil {
		return nil, err
	}
	response := &pb.TokenizeResponse{Tokenizer: "words"}
	for _, text := range request.GetTexts() {
		list := &pb.TokenList{}
		for i, word := range strings.Fields(text) {
			list.Ids = append(list.Ids, int32(i))
			list.Pieces = append(list.Pieces, []byte(word))
		}
		response.Lists = append(response.Lists, list)
	}
	return response, nil
}

type lister struct {
	pb.UnimplementedModelServiceServer
	gateway *Gateway
}

func (s *lister) ListModels(ctx context.Context, request *pb.ListModelsRequest) (_ *pb.ListModelsResponse, err error) {
	call, end := s.gateway.accept(ctx, "ListModels", request)
	defer end(&err)
	if err := s.gateway.authorized(call); err != nil {
		return nil, err
	}
	size := 100
	if n := int(request.GetPageSize()); n > 0 {
		size = n
	}
	begin := 0
	if token := request.GetPageToken(); token != "" {
		if begin, err = strconv.Atoi(token); err != nil || begin < 0 || begin > len(s.gateway.models) {
			return nil, refused(tokenwire.ReasonInvalidRequest, "page_token: not from an earlier page")
		}
	}
	response := &pb.ListModelsResponse{}
	stop := min(begin+size, len(s.gateway.models))
	for _, name := range s.gateway.models[begin:stop] {
		response.Models = append(response.Models, model(name))
	}
	if stop < len(s.gateway.models) {
		response.NextPageToken = strconv.Itoa(stop)
	}
	return response, nil
}

func (s *lister) GetModel(ctx context.Context, request *pb.GetModelRequest) (_ *pb.GetModelResponse, err error) {
	call, end := s.gateway.accept(ctx, "GetModel", request)
	defer end(&err)
	if err := s.gateway.authorized(call); err != nil {
		return nil, err
	}
	if !slices.Contains(s.gateway.models, request.GetName()) {
		return nil, refused(tokenwire.ReasonModelNotFound, fmt.Sprintf("no model %q", request.GetName()))
	}
	return &pb.GetModelResponse{Model: model(request.GetName())}, nil
}

func model(name string) *pb.Model {
	return &pb.Model{Name: name, Upstream: "fake", UpstreamModel: name, Tokenizer: "words"}
}
