package main

import (
	"context"
	"errors"
	"io"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	contract "github.com/tokenwire/tokenwire/clients/go/tokenwire/v1"
	"github.com/tokenwire/tokenwire/tests/bench/go/answer"
)

// grpcTarget calls the contract over one connection, which any number of calls may share.
type grpcTarget struct {
	stub    contract.ChatServiceClient
	request *contract.ChatRequest
	headers metadata.MD
	options options
}

// Windows that hold whatever a stream sends, so that the generator never makes the server wait, and
// no probing for a better size. A slow reader has gRPC's own 64 KiB.
const window = 8 << 20

func dialGRPC(o options, r *results, slow bool) (*grpcTarget, error) {
	dial := []grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			return dialCounting(ctx, address, r)
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20), grpc.MaxCallSendMsgSize(64<<20)),
		grpc.WithDisableRetry(),
	}
	if !slow {
		dial = append(dial, grpc.WithInitialWindowSize(window), grpc.WithInitialConnWindowSize(window))
	}
	conn, err := grpc.NewClient("passthrough:///"+o.grpc, dial...)
	if err != nil {
		return nil, err
	}
	model := o.model
	if slow {
		model = o.slowModel
	}
	request := &contract.ChatRequest{Model: model}
	content := o.prompt()
	request.Messages = []*contract.ChatMessage{{Role: "user", Content: &content}}
	if o.expected.tools {
		request.Tools = []*contract.Tool{{Tool: &contract.Tool_Function{Function: &contract.FunctionTool{
			Name: answer.ToolName, ParametersSchemaJson: toolSchema,
		}}}}
	}
	headers := metadata.MD{}
	for name, value := range o.headers {
		headers.Append(name, value)
	}
	return &grpcTarget{contract.NewChatServiceClient(conn), request, headers, o}, nil
}

func (t *grpcTarget) call(ctx context.Context, r *receipt) (string, error) {
	ctx = metadata.NewOutgoingContext(ctx, t.headers)
	if !t.options.stream {
		reply, err := t.stub.Chat(ctx, t.request)
		if err != nil {
			return wireName(err), err
		}
		r.message(contentOf(reply), time.Now())
		r.ordered = true
		return okIfWhole(r)
	}
	stream, err := t.stub.StreamChat(ctx, &contract.StreamChatRequest{Chat: t.request})
	if err != nil {
		return wireName(err), err
	}
	for {
		event, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return okIfWhole(r)
		}
		if err != nil {
			return wireName(err), err
		}
		switch event := event.Event.(type) {
		case *contract.StreamChatResponse_Delta:
			text := event.Delta.Content
			for _, part := range event.Delta.ToolCalls {
				text += part.Arguments
			}
			r.message(text, time.Now())
		case *contract.StreamChatResponse_Trailer:
			r.message("", time.Now())
			r.ordered = true
		default:
			r.message("", time.Now())
		}
	}
}

// readSlowly takes one message each pause, until its context ends. Its answers are not checked.
func (t *grpcTarget) readSlowly(ctx context.Context, pause time.Duration) {
	ctx = metadata.NewOutgoingContext(ctx, t.headers)
	for ctx.Err() == nil {
		stream, err := t.stub.StreamChat(ctx, &contract.StreamChatRequest{Chat: t.request})
		for err == nil {
			_, err = stream.Recv()
			sleep(ctx, pause)
		}
		sleep(ctx, pause)
	}
}

func contentOf(reply *contract.ChatResponse) string {
	if len(reply.Choices) != 1 {
		return ""
	}
	message := reply.Choices[0].Message
	text := message.GetContent()
	for _, call := range message.ToolCalls {
		text += call.GetFunction().GetArgumentsJson()
	}
	return text
}

// wireName is a status as gRPC's documents write it, such as RESOURCE_EXHAUSTED.
func wireName(err error) string {
	code := status.Code(err)
	for name, number := range codeNames {
		if number == code {
			return name
		}
	}
	return code.String()
}

var codeNames = map[string]codes.Code{
	"CANCELLED": codes.Canceled, "UNKNOWN": codes.Unknown, "INVALID_ARGUMENT": codes.InvalidArgument,
	"DEADLINE_EXCEEDED": codes.DeadlineExceeded, "NOT_FOUND": codes.NotFound,
	"PERMISSION_DENIED": codes.PermissionDenied, "RESOURCE_EXHAUSTED": codes.ResourceExhausted,
	"FAILED_PRECONDITION": codes.FailedPrecondition, "ABORTED": codes.Aborted,
	"UNIMPLEMENTED": codes.Unimplemented, "INTERNAL": codes.Internal, "UNAVAILABLE": codes.Unavailable,
	"DATA_LOSS": codes.DataLoss, "UNAUTHENTICATED": codes.Unauthenticated,
}
