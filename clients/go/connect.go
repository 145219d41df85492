package tokenwire

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
)

const (
	// DefaultTarget is where a client connects that is told nothing else.
	DefaultTarget = "localhost:50051"
	// DefaultTimeout is how long a call with one answer may take when nobody said: long answers
	// take minutes.
	DefaultTimeout = 600 * time.Second
	// MaxMessageBytes is the largest message in either direction: room for inline images. The
	// gateway has the same.
	MaxMessageBytes = 32 << 20
)

// A TokenSource returns the current bearer token. It is asked once per call, with the call's
// context, from any goroutine; "" means no token.
type TokenSource func(ctx context.Context) (string, error)

// An Option says how a [Client] reaches its gateway.
type Option func(*connection) error

type connection struct {
	tokens   TokenSource
	tls      *tls.Config
	timeout  time.Duration
	ping     time.Duration
	dialling []grpc.DialOption
}

// WithToken presents a fixed bearer token; "" presents none, whatever the environment holds.
func WithToken(token string) Option {
	return func(c *connection) error {
		if err := checkToken(token); err != nil {
			return err
		}
		c.tokens = func(context.Context) (string, error) { return token, nil }
		return nil
	}
}

// WithTokenSource presents the bearer token that source returns, asked once per call.
func WithTokenSource(source TokenSource) Option {
	return func(c *connection) error {
		if source == nil {
			return errors.New("tokenwire: WithTokenSource: expected a function, got nil")
		}
		c.tokens = source
		return nil
	}
}

// WithTLS encrypts the connection. nil is the system's authorities; a config of one's own may
// bring authorities and, for mutual TLS, certificates. What it does not bring stays as
// [WithCAFile] and [WithCertificateFiles] have it; where both do, the later option counts. Without
// any of the three the connection is plaintext.
func WithTLS(config *tls.Config) Option {
	return func(c *connection) error {
		if config == nil {
			config = &tls.Config{}
		}
		before := c.encrypted()
		c.tls = config.Clone()
		if c.tls.RootCAs == nil {
			c.tls.RootCAs = before.RootCAs
		}
		if c.tls.Certificates == nil && c.tls.GetClientCertificate == nil {
			c.tls.Certificates = before.Certificates
		}
		return nil
	}
}

// WithCAFile encrypts the connection and trusts the authorities in a PEM file, and no others.
func WithCAFile(path string) Option {
	return func(c *connection) error {
		pem, err := os.ReadFile(path)
		if err != nil {
			return fmt.Errorf("tokenwire: authorities: %w", err)
		}
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(pem) {
			return fmt.Errorf("tokenwire: authorities: no certificate in %s", path)
		}
		c.encrypted().RootCAs = pool
		return nil
	}
}

// WithCertificateFiles encrypts the connection and shows a certificate of one's own, for mutual
// TLS. Both files are PEM.
func WithCertificateFiles(certificate, key string) Option {
	return func(c *connection) error {
		pair, err := tls.LoadX509KeyPair(certificate, key)
		if err != nil {
			return fmt.Errorf("tokenwire: certificate: %w", err)
		}
		config := c.encrypted()
		config.Certificates = append(config.Certificates, pair)
		return nil
	}
}

// WithTimeout changes how long a call with one answer may take when its context has no deadline;
// 0 is for ever. Streams and batches have no such limit.
func WithTimeout(timeout time.Duration) Option {
	return func(c *connection) error {
		if timeout < 0 {
			return fmt.Errorf("tokenwire: WithTimeout: expected 0 or more, got %v", timeout)
		}
		c.timeout = timeout
		return nil
	}
}

// WithDialOptions passes options on to gRPC. They come after this package's own and so replace
// them, except that interceptors are added.
func WithDialOptions(options ...grpc.DialOption) Option {
	return func(c *connection) error {
		c.dialling = append(c.dialling, options...)
		return nil
	}
}

func (c *connection) encrypted() *tls.Config {
	if c.tls == nil {
		c.tls = &tls.Config{}
	}
	return c.tls
}

func (c *connection) open(target string) (*grpc.ClientConn, error) {
	if target == "" {
		target = os.Getenv("TOKENWIRE_TARGET")
	}
	if target == "" {
		target = DefaultTarget
	}
	switch scheme, _, found := strings.Cut(target, "://"); {
	case found && (scheme == "http" || scheme == "https" || scheme == "grpc" || scheme == "grpcs"):
		return nil, fmt.Errorf("tokenwire: target: expected HOST:PORT, without a scheme, got %q", target)
	}
	if c.tokens == nil {
		if err := WithToken(os.Getenv("TOKENWIRE_TOKEN"))(c); err != nil {
			return nil, fmt.Errorf("%w, in TOKENWIRE_TOKEN", err)
		}
	}
	transport := insecure.NewCredentials()
	if c.tls != nil {
		transport = credentials.NewTLS(c.tls)
	}
	options := []grpc.DialOption{
		grpc.WithTransportCredentials(transport),
		grpc.WithUserAgent("tokenwire-go/" + Version),
		grpc.WithDefaultServiceConfig(serviceConfig()),
		// A TXT record must not decide what is retried, and so what is billed.
		grpc.WithDisableServiceConfig(),
		grpc.WithDefaultCallOptions(
			grpc.MaxCallSendMsgSize(MaxMessageBytes),
			grpc.MaxCallRecvMsgSize(MaxMessageBytes),
			// gRPC does not retry what it has not kept, and keeps 256 kB unless told otherwise.
			grpc.MaxRetryRPCBufferSize(MaxMessageBytes),
		),
		// A model may think for minutes in silence. These pings notice a dead connection, and
		// keep proxies from dropping a live one; the gateway allows one per 10 s.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{
			Time: c.ping, Timeout: 20 * time.Second, PermitWithoutStream: true,
		}),
		// Interceptors rather than call credentials: gRPC refuses those on a plaintext
		// connection, which is what a client behind a service mesh has.
		grpc.WithChainUnaryInterceptor(c.authorizeUnary),
		grpc.WithChainStreamInterceptor(c.authorizeStream),
	}
	conn, err := grpc.NewClient(target, append(options, c.dialling...)...)
	if err != nil {
		return nil, fmt.Errorf("tokenwire: %w", err)
	}
	return conn, nil
}

func (c *connection) authorizeUnary(
	ctx context.Context, method string, request, reply any,
	conn *grpc.ClientConn, invoke grpc.UnaryInvoker, options ...grpc.CallOption,
) error {
	ctx, err := c.authorize(ctx)
	if err != nil {
		return err
	}
	return invoke(ctx, method, request, reply, conn, options...)
}

func (c *connection) authorizeStream(
	ctx context.Context, desc *grpc.StreamDesc, conn *grpc.ClientConn,
	method string, open grpc.Streamer, options ...grpc.CallOption,
) (grpc.ClientStream, error) {
	ctx, err := c.authorize(ctx)
	if err != nil {
		return nil, err
	}
	return open(ctx, desc, conn, method, options...)
}

func (c *connection) authorize(ctx context.Context) (context.Context, error) {
	if sent, _ := metadata.FromOutgoingContext(ctx); first(sent, "authorization") != "" {
		return ctx, nil // the caller presents something else for this call
	}
	token, err := c.tokens(ctx)
	if err == nil {
		err = checkToken(token)
	}
	if err != nil {
		code := codes.Unauthenticated
		if ctx.Err() != nil { // the source gave up because the call did
			code = codes.Canceled
			if errors.Is(ctx.Err(), context.DeadlineExceeded) {
				code = codes.DeadlineExceeded
			}
		}
		return nil, &Error{Code: code, Message: "no token: " + err.Error(), cause: err}
	}
	if token == "" {
		return ctx, nil
	}
	return metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token), nil
}

func checkToken(token string) error {
	for _, c := range []byte(token) {
		if c <= ' ' || c > '~' {
			// Never the token itself: this text ends up in logs.
			return errors.New("tokenwire: token: holds a space, a line end or a character outside ASCII")
		}
	}
	return nil
}

// retried are the RPCs that gRPC may try again, by name. Chats are retried only when the gateway
// (or no gateway) answered UNAVAILABLE before the first byte of an answer: gRPC commits a call
// once its headers arrive. The gateway sends grpc-retry-pushback-ms: -1 when it has used up its
// own retries, which ends these too. CANCELLED is what gRPC itself answers for a server that is told
// to end, to calls that cross its GOAWAY; a cancel of one's own is never retried. No other code is
// retried: it would repeat what is billed, or what cannot succeed.
var retried = []methodName{
	{"tokenwire.v1.ChatService", "Chat"},
	{"tokenwire.v1.ChatService", "StreamChat"},
	{"tokenwire.v1.ChatService", "BatchChat"},
	{"tokenwire.v1.TokenizerService", "CountTokens"},
	{"tokenwire.v1.TokenizerService", "Tokenize"},
	{"tokenwire.v1.ModelService", "ListModels"},
	{"tokenwire.v1.ModelService", "GetModel"},
}

type methodName struct {
	Service string `json:"service"`
	Method  string `json:"method"`
}

func serviceConfig() string {
	type object map[string]any
	text, err := json.Marshal(object{
		"loadBalancingConfig": []object{{"round_robin": object{}}},
		"methodConfig": []object{{
			"name": retried,
			"retryPolicy": object{
				"maxAttempts":          3,
				"initialBackoff":       "0.2s",
				"maxBackoff":           "5s",
				"backoffMultiplier":    2,
				"retryableStatusCodes": []string{"UNAVAILABLE", "CANCELLED"},
			},
		}},
		// Retries end while half of these are used up: a failure costs one, and ten calls that
		// succeed earn one. Enough for the calls of a replica that dies, not for an outage.
		"retryThrottling": object{"maxTokens": 100, "tokenRatio": 0.1},
	})
	if err != nil {
		panic(err) // only constants are in it
	}
	return string(text)
}
