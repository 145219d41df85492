/**
 * Chat with any model behind a Tokenwire gateway: one answer, a stream or a batch. Begin with
 * {@link io.tokenwire.TokenwireClient}.
 */
package io.tokenwire;
