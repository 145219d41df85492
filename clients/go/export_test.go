package tokenwire

import "time"

// ServiceConfig is what New gives to gRPC.
var ServiceConfig = serviceConfig

// FromCall is how the end of an RPC becomes an error.
var FromCall = fromCall

// WithPing changes how often an idle connection is pinged, and nothing else.
func WithPing(every time.Duration) Option {
	return func(c *connection) error {
		c.ping = every
		return nil
	}
}
