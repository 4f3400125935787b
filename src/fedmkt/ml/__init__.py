"""The torch boundary: everything that touches a model lives here, and nothing outside imports torch but the services that own one."""
