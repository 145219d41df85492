package tokenwire

// Version of this module, part of the user agent.
const Version = "0.1.0"
