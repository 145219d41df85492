/** A gateway inside your test process: see {@link io.tokenwire.testing.FakeGateway}. */
package io.tokenwire.testing;
