package tokenwire

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "github.com/tokenwire/tokenwire/clients/go/tokenwire/v1"
)

// Client talks to one gateway, over one connection per replica of it. It is safe for use by
// several goroutines; make one, share it, and Close it in the end.
type Client struct {
	conn    *grpc.ClientConn
	chat    pb.ChatServiceClient
	tokens  pb.TokenizerServiceClient
	models  pb.ModelServiceClient
	timeout time.Duration
}

// New returns a client of the gateway at target, which is HOST:PORT or any target of gRPC such as
// "dns:///gateway.internal:443". "" is the environment's TOKENWIRE_TARGET, else [DefaultTarget].
// Without an option for it the token is the environment's TOKENWIRE_TOKEN, if there is one.
//
// New connects to nothing yet: an address that is wrong fails the first call.
func New(target string, options ...Option) (*Client, error) {
	c := &connection{timeout: DefaultTimeout, ping: 30 * time.Second}
	for _, option := range options {
		if err := option(c); err != nil {
			return nil, err
		}
	}
	conn, err := c.open(target)
	if err != nil {
		return nil, err
	}
	return &Client{
		conn:    conn,
		chat:    pb.NewChatServiceClient(conn),
		tokens:  pb.NewTokenizerServiceClient(conn),
		models:  pb.NewModelServiceClient(conn),
		timeout: c.timeout,
	}, nil
}

// Close ends the calls that run with the code Canceled, and the connection.
func (c *Client) Close() error { return c.conn.Close() }

// Conn returns the connection, for clients generated from other contracts (health, reflection):
// calls over it present the token, too.
func (c *Client) Conn() grpc.ClientConnInterface { return c.conn }

// Chat returns the whole answer to a request.
func (c *Client) Chat(ctx context.Context, request Request, options ...CallOption) (*Reply, error) {
	chat, refusal := request.proto()
	if refusal != nil {
		return nil, refusal
	}
	response, id, err := unary(ctx, c, c.chat.Chat, chat, options)
	if err != nil {
		return nil, err
	}
	return newReply(response, id), nil
}

// TokenCount is how many tokens an input has.
type TokenCount struct {
	Total     int
	Tokenizer string // that counted, for example "o200k_base"
	// Exact is false when the tokenizer or the layout of a chat is an approximation.
	Exact bool
}

// CountTokens counts the tokens of a text as it is, without calling the model.
func (c *Client) CountTokens(ctx context.Context, model, text string, options ...CallOption) (TokenCount, error) {
	if err := checkText("text", model, text); err != nil {
		return TokenCount{}, err
	}
	return c.count(ctx, &pb.CountTokensRequest{
		Model: model, Input: &pb.CountTokensRequest_Text{Text: text},
	}, options)
}

// CountChatTokens counts the tokens of a request as the model sees it, with its layout, tools and
// format, without calling the model.
func (c *Client) CountChatTokens(ctx context.Context, request Request, options ...CallOption) (TokenCount, error) {
	chat, refusal := request.proto()
	if refusal != nil {
		return TokenCount{}, refusal
	}
	return c.count(ctx, &pb.CountTokensRequest{
		Model: chat.GetModel(), Input: &pb.CountTokensRequest_Chat{Chat: chat},
	}, options)
}

func (c *Client) count(ctx context.Context, request *pb.CountTokensRequest, options []CallOption) (TokenCount, error) {
	response, _, err := unary(ctx, c, c.tokens.CountTokens, request, options)
	if err != nil {
		return TokenCount{}, err
	}
	return TokenCount{int(response.GetTotalTokens()), response.GetTokenizer(), response.GetExact()}, nil
}

// Tokens are those of one text.
type Tokens struct {
	IDs []int
	// Pieces are the bytes of each token: together they are the text.
	Pieces [][]byte
}

// Tokenize returns the tokens of each text, in order; at most 256 texts.
func (c *Client) Tokenize(ctx context.Context, model string, texts []string, options ...CallOption) ([]Tokens, error) {
	if err := checkText("texts", append([]string{model}, texts...)...); err != nil {
		return nil, err
	}
	request := &pb.TokenizeRequest{Model: model, Texts: texts}
	response, id, err := unary(ctx, c, c.tokens.Tokenize, request, options)
	if err != nil {
		return nil, err
	}
	if got := len(response.GetLists()); got != len(texts) {
		return nil, incomplete(fmt.Sprintf("got the tokens of %d of %d texts", got, len(texts)), id)
	}
	lists := make([]Tokens, len(texts))
	for i, list := range response.GetLists() {
		lists[i].Pieces = list.GetPieces()
		for _, token := range list.GetIds() {
			lists[i].IDs = append(lists[i].IDs, int(token))
		}
	}
	return lists, nil
}

// Model is one that can be asked.
type Model struct {
	Name                string
	Aliases             []string
	Upstream            string // as the gateway's configuration names it
	UpstreamModel       string // as the upstream names it
	ContextWindowTokens int    // 0 when unknown
	MaxCompletionTokens int    // 0 when there is no cap
	Capabilities        []string
	Tokenizer           string
	// Extra is the JSON object of the upstream's own entry.
	Extra json.RawMessage
}

// Models returns every model that the caller may use, from all pages.
func (c *Client) Models(ctx context.Context, options ...CallOption) ([]Model, error) {
	var models []Model
	request := &pb.ListModelsRequest{}
	read := map[string]bool{} // tokens of pages
	for {
		response, id, err := unary(ctx, c, c.models.ListModels, request, options)
		if err != nil {
			return nil, err
		}
		for _, model := range response.GetModels() {
			models = append(models, modelOf(model))
		}
		next := response.GetNextPageToken()
		if next == "" {
			return models, nil
		}
		if read[next] {
			return nil, incomplete("the list of models goes on with a page that was read", id)
		}
		read[next] = true
		request = &pb.ListModelsRequest{PageToken: next}
	}
}

// Model returns one model, by name or alias.
func (c *Client) Model(ctx context.Context, name string, options ...CallOption) (Model, error) {
	if err := checkText("name", name); err != nil {
		return Model{}, err
	}
	response, id, err := unary(ctx, c, c.models.GetModel, &pb.GetModelRequest{Name: name}, options)
	if err != nil {
		return Model{}, err
	}
	if response.GetModel() == nil {
		return Model{}, incomplete("got an answer without a model", id)
	}
	return modelOf(response.GetModel()), nil
}

func modelOf(p *pb.Model) Model {
	return Model{
		Name: p.GetName(), Aliases: p.GetAliases(), Upstream: p.GetUpstream(),
		UpstreamModel:       p.GetUpstreamModel(),
		ContextWindowTokens: int(p.GetContextWindowTokens()),
		MaxCompletionTokens: int(p.GetMaxCompletionTokens()),
		Capabilities:        p.GetCapabilities(), Tokenizer: p.GetTokenizer(), Extra: raw(p.GetExtraJson()),
	}
}

// --- options of calls ---------------------------------------------------------------

// CallOption is an option of any call.
type CallOption interface {
	StreamOption
	BatchOption
	applyCall(*call) *Error
}

// StreamOption is an option of [Client.Stream]: any CallOption, [Cumulative] or [MaxDelay].
type StreamOption interface{ applyStream(*call) *Error }

// BatchOption is an option of [Client.Batch]: any CallOption, or [MaxConcurrency].
type BatchOption interface{ applyBatch(*call) *Error }

type (
	callOption   func(*call) *Error
	streamOption func(*call) *Error
	batchOption  func(*call) *Error
)

func (o callOption) applyCall(c *call) *Error     { return o(c) }
func (o callOption) applyStream(c *call) *Error   { return o(c) }
func (o callOption) applyBatch(c *call) *Error    { return o(c) }
func (o streamOption) applyStream(c *call) *Error { return o(c) }
func (o batchOption) applyBatch(c *call) *Error   { return o(c) }

// call is what one RPC is sent with.
type call struct {
	requestID      string
	metadata       []string // keys and values by turns
	grpc           []grpc.CallOption
	mode           pb.StreamMode
	maxDelay       *durationpb.Duration
	maxConcurrency int32
}

// WithRequestID sets the call's x-request-id, which finds it in the gateway's log; without it the
// one in the context's outgoing metadata counts, else one is made up.
func WithRequestID(id string) CallOption {
	return callOption(func(c *call) *Error {
		if id == "" || !printable(id) {
			return refused("x-request-id", "expected printable ASCII, got %s", start([]byte(id)))
		}
		c.requestID = id
		return nil
	})
}

// WithMetadata sends one more key of gRPC metadata, such as "traceparent". What the context's
// outgoing metadata holds is sent anyway.
func WithMetadata(key, value string) CallOption {
	return callOption(func(c *call) *Error {
		key := strings.ToLower(key)
		if key == requestIDKey || key == "authorization" {
			return refused(key, "has its own option: WithRequestID, WithToken")
		}
		c.metadata = append(c.metadata, key, value)
		return nil
	})
}

// WithGRPC passes options of gRPC on, such as [grpc.Header] or [grpc.WaitForReady].
func WithGRPC(options ...grpc.CallOption) CallOption {
	return callOption(func(c *call) *Error {
		c.grpc = append(c.grpc, options...)
		return nil
	})
}

// Cumulative has the gateway send all text so far with each event. It costs the square of the
// answer's length, for what [Stream.SoFar] gives anyway; it is for those who need that form.
func Cumulative() StreamOption {
	return streamOption(func(c *call) *Error {
		c.mode = pb.StreamMode_STREAM_MODE_CUMULATIVE
		return nil
	})
}

// MaxDelay lets the gateway hold text so long to send fewer, larger events; up to 5 s.
func MaxDelay(delay time.Duration) StreamOption {
	return streamOption(func(c *call) *Error {
		c.maxDelay = durationpb.New(delay)
		return nil
	})
}

// MaxConcurrency is how many requests of a batch run at once; 0, the default, is 20.
func MaxConcurrency(n int) BatchOption {
	return batchOption(func(c *call) *Error {
		var err *Error
		c.maxConcurrency, err = int32Of("max_concurrency", n)
		return err
	})
}

// outgoing returns ctx with the metadata of the call, and decides its request id.
func (c *call) outgoing(ctx context.Context) (context.Context, *Error) {
	sent, _ := metadata.FromOutgoingContext(ctx)
	if given := first(sent, requestIDKey); given != "" && c.requestID == "" {
		c.requestID = given
	} else {
		if c.requestID == "" {
			c.requestID = newRequestID()
		}
		if given != "" { // the option wins: a second value would be a second id
			sent = sent.Copy()
			sent.Delete(requestIDKey)
			ctx = metadata.NewOutgoingContext(ctx, sent)
		}
		ctx = metadata.AppendToOutgoingContext(ctx, requestIDKey, c.requestID)
	}
	for pair := range slices.Chunk(c.metadata, 2) {
		if !strings.HasSuffix(pair[0], "-bin") && !printable(pair[1]) {
			return nil, refused("metadata", "%s: expected printable ASCII", pair[0])
		}
		ctx = metadata.AppendToOutgoingContext(ctx, pair...)
	}
	return ctx, nil
}

func newRequestID() string {
	var id [16]byte
	if _, err := rand.Read(id[:]); err != nil {
		panic(err) // Go's documentation: it never fails
	}
	return hex.EncodeToString(id[:])
}

func printable(text string) bool {
	for _, c := range []byte(text) {
		if c < ' ' || c > '~' {
			return false
		}
	}
	return true
}

// unary makes a call with one answer. It returns an error, not an *Error: a nil one must be nil.
func unary[In, Out any](
	ctx context.Context, client *Client,
	method func(context.Context, *In, ...grpc.CallOption) (*Out, error),
	request *In, options []CallOption,
) (*Out, string, error) {
	c := &call{}
	for _, option := range options {
		if err := option.applyCall(c); err != nil {
			return nil, "", err
		}
	}
	ctx, refusal := c.outgoing(ctx)
	if refusal != nil {
		return nil, "", refusal
	}
	if _, has := ctx.Deadline(); !has && client.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, client.timeout)
		defer cancel()
	}
	var trailer metadata.MD
	response, err := method(ctx, request, append(c.grpc, grpc.Trailer(&trailer))...)
	if err != nil {
		return nil, c.requestID, fromCall(err, trailer, c.requestID)
	}
	return response, c.requestID, nil
}
