package tokenwire_test

import (
	"context"
	"errors"
	"net"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	tokenwire "github.com/tokenwire/tokenwire/clients/go"
	pb "github.com/tokenwire/tokenwire/clients/go/tokenwire/v1"
	"github.com/tokenwire/tokenwire/clients/go/tokenwiretest"
)

// odd is a server that says OK to nonsense, which no gateway does.
type odd struct {
	pb.UnimplementedChatServiceServer
	pb.UnimplementedModelServiceServer
	pb.UnimplementedTokenizerServiceServer
	results []*pb.BatchChatResponse
}

func (o *odd) BatchChat(_ *pb.BatchChatRequest, stream grpc.ServerStreamingServer[pb.BatchChatResponse]) error {
	for _, result := range o.results {
		if err := stream.Send(result); err != nil {
			return err
		}
	}
	return nil
}

// StreamChat breaks amid its answer, and nobody says why, as when a gateway is killed.
func (o *odd) StreamChat(request *pb.StreamChatRequest, stream grpc.ServerStreamingServer[pb.StreamChatResponse]) error {
	if request.GetChat().GetModel() == "begins" {
		delta := &pb.Delta{Content: "Hel"}
		if err := stream.Send(&pb.StreamChatResponse{Event: &pb.StreamChatResponse_Delta{Delta: delta}}); err != nil {
			return err
		}
	}
	return status.Error(codes.Unavailable, "error reading from server: EOF")
}

// ListModels has two pages, and each goes on with the other.
func (o *odd) ListModels(_ context.Context, request *pb.ListModelsRequest) (*pb.ListModelsResponse, error) {
	next := map[string]string{"": "1", "1": "2", "2": "1"}[request.GetPageToken()]
	return &pb.ListModelsResponse{Models: []*pb.Model{{Name: "again"}}, NextPageToken: next}, nil
}

func (o *odd) GetModel(context.Context, *pb.GetModelRequest) (*pb.GetModelResponse, error) {
	return &pb.GetModelResponse{}, nil
}

func (o *odd) Tokenize(context.Context, *pb.TokenizeRequest) (*pb.TokenizeResponse, error) {
	return &pb.TokenizeResponse{}, nil
}

func (o *odd) client(t *testing.T) *tokenwire.Client {
	listener := must[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0"))
	server := grpc.NewServer()
	pb.RegisterChatServiceServer(server, o)
	pb.RegisterModelServiceServer(server, o)
	pb.RegisterTokenizerServiceServer(server, o)
	go server.Serve(listener)
	t.Cleanup(server.Stop)
	client := must[*tokenwire.Client](t)(tokenwire.New(listener.Addr().String()))
	t.Cleanup(func() { client.Close() })
	return client
}

func TestAStreamWhoseConnectionBrokeWasInterrupted(t *testing.T) {
	t.Parallel()
	client := (&odd{}).client(t)
	for model, reason := range map[string]tokenwire.Reason{
		"begins": tokenwire.ReasonUpstreamStreamInterrupted,
		"never":  "", // nothing of an answer had come
	} {
		stream := client.Stream(context.Background(), tokenwire.Request{Model: model, Messages: []tokenwire.Message{tokenwire.User("x")}})
		var failed *tokenwire.Error
		for _, err := range stream.All() {
			errors.As(err, &failed)
		}
		if failed == nil || failed.Code != codes.Unavailable || failed.Reason != reason {
			t.Errorf("%s: got %v", model, failed)
		}
	}
}

func TestOKWithoutEveryResultIsAnError(t *testing.T) {
	t.Parallel()
	one := func(index int32) *pb.BatchChatResponse {
		return &pb.BatchChatResponse{Index: index, Result: &pb.BatchChatResponse_Response{Response: &pb.ChatResponse{}}}
	}
	for name, results := range map[string][]*pb.BatchChatResponse{
		"none":             nil,
		"one of two":       {one(1)},
		"one twice":        {one(1), one(1)},
		"one not asked":    {one(1), one(2)},
		"one below":        {one(1), one(-1)},
		"only a heartbeat": {{}},
	} {
		client := (&odd{results: results}).client(t)
		var failed error
		for _, err := range client.Batch(ctx, three[:2]) {
			failed = err
		}
		equal(t, name, failure(t, failed).Reason, tokenwire.ReasonStreamIncomplete)
		equal(t, name, failure(t, failed).Code, codes.Internal)
		ordered, err := client.BatchOrdered(ctx, three[:2])
		if name != "one of two" { // nothing, or nobody knows whose
			equal(t, name, failure(t, err).Reason, tokenwire.ReasonStreamIncomplete)
			continue
		}
		equal(t, name, failure(t, ordered[0].Err).Reason, tokenwire.ReasonStreamIncomplete)
		equal(t, name, ordered[1].Err, nil)
	}
	whole := (&odd{results: []*pb.BatchChatResponse{{}, one(1), {}, one(0)}}).client(t)
	equal(t, "heartbeats are passed over", len(must[[]tokenwire.BatchResult](t)(whole.BatchOrdered(ctx, three[:2]))), 2)
}

func TestOKWithoutTheAnswerIsAnError(t *testing.T) {
	t.Parallel()
	client := (&odd{}).client(t)
	_, err := client.Models(ctx) // which would not end
	equal(t, "models", failure(t, err).Reason, tokenwire.ReasonStreamIncomplete)
	_, err = client.Model(ctx, "m")
	equal(t, "model", failure(t, err).Reason, tokenwire.ReasonStreamIncomplete)
	_, err = client.Tokenize(ctx, "m", []string{"a"})
	equal(t, "tokens", failure(t, err).Reason, tokenwire.ReasonStreamIncomplete)
	_, err = client.Chat(ctx, hi)
	equal(t, "of somebody else", failure(t, err).Code, codes.Unimplemented)
	equal(t, "of somebody else", failure(t, err).Reason, "")
}

// TestAnIdleStream: a stream survives a model that thinks in silence, behind a proxy that drops
// connections it believes dead, and at a gateway that is strict about pings. The default client
// pings each 30 s; here that is 10 s, the least gRPC allows, and so is the silence shorter.
// `make test-idle` has the default options and 130 s.
func TestAnIdleStream(t *testing.T) {
	t.Parallel()
	silence, patience, options := 24*time.Second, 15*time.Second, []tokenwire.Option{tokenwire.WithPing(10 * time.Second)}
	if os.Getenv("TOKENWIRE_TEST_IDLE") != "" {
		silence, patience, options = 130*time.Second, 45*time.Second, nil
	}
	gateway := tokenwiretest.NewGateway(t)
	gateway.Hang(tokenwiretest.Text("Hel"))
	proxy := impatient(t, gateway.Target, patience)
	client := must[*tokenwire.Client](t)(tokenwire.New(proxy, options...))
	defer client.Close()
	stream := client.Stream(ctx, hi)
	left := time.AfterFunc(silence, func() { stream.Close() })
	defer left.Stop()
	begun := time.Now()
	_, text, err := read(stream)
	equal(t, "text", text, "Hel")
	if failed := failure(t, err); failed.Code != codes.Canceled || time.Since(begun) < silence {
		t.Errorf("after %v: %v", time.Since(begun), failed)
	}
	equal(t, "calls", len(gateway.Calls()), 1)
}

// TestAnIdleConnection: without a call, too, pings keep a connection that the next call finds alive.
func TestAnIdleConnection(t *testing.T) {
	t.Parallel()
	gateway := tokenwiretest.NewGateway(t)
	proxy, connections := counted(t, gateway.Target, 15*time.Second)
	client := must[*tokenwire.Client](t)(tokenwire.New(proxy, tokenwire.WithPing(10*time.Second)))
	defer client.Close()
	must[[]tokenwire.Model](t)(client.Models(ctx))
	time.Sleep(20 * time.Second)
	must[[]tokenwire.Model](t)(client.Models(ctx))
	equal(t, "connections", connections.Load(), 1)
}

func TestTheProxyOfTheIdleTestDropsWhatIsSilent(t *testing.T) {
	t.Parallel()
	gateway := tokenwiretest.NewGateway(t)
	gateway.Hang(tokenwiretest.Text("Hel"))
	client := must[*tokenwire.Client](t)(tokenwire.New(impatient(t, gateway.Target, time.Second)))
	defer client.Close()
	_, text, err := read(client.Stream(ctx, hi))
	equal(t, "text", text, "Hel")
	equal(t, "code", failure(t, err).Code, codes.Unavailable)
	equal(t, "partial", failure(t, err).PartialText(), "Hel")
}

// impatient is a proxy before target that drops a connection over which its client has sent
// nothing for so long.
func impatient(t *testing.T, target string, patience time.Duration) string {
	proxy, _ := counted(t, target, patience)
	return proxy
}

// counted is an impatient proxy with the number of its connections.
func counted(t *testing.T, target string, patience time.Duration) (string, *atomic.Int64) {
	var connections atomic.Int64
	listener := must[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0"))
	t.Cleanup(func() { listener.Close() })
	pipe := func(from, to net.Conn, heard *atomic.Int64) {
		defer from.Close()
		defer to.Close()
		buffer := make([]byte, 32<<10)
		for {
			n, err := from.Read(buffer)
			if n > 0 {
				heard.Store(time.Now().UnixNano())
				if _, err := to.Write(buffer[:n]); err != nil {
					return
				}
			}
			if err != nil {
				return
			}
		}
	}
	go func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			connections.Add(1)
			server, err := net.Dial("tcp", target)
			if err != nil {
				client.Close()
				continue
			}
			var heard, ignored atomic.Int64
			heard.Store(time.Now().UnixNano())
			go pipe(client, server, &heard)
			go pipe(server, client, &ignored)
			go func() {
				for time.Since(time.Unix(0, heard.Load())) < patience {
					time.Sleep(100 * time.Millisecond)
				}
				client.Close()
			}()
		}
	}()
	return listener.Addr().String(), &connections
}
